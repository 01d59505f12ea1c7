"""The HTML report, in a real browser."""

from __future__ import annotations

import base64
import io
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from rba_compress import Architecture, ArtifactError, Budget, Report, Result, load
from rba_compress.artifacts.artifact import read_report
from rba_compress.cli.digits import ARCHITECTURE, ARGUMENTS
from rba_compress.cli.main import main
from rba_compress.core.batch import as_batch
from rba_compress.profiling.fidelity import Fidelity, compare_outputs
from rba_compress.reporting.changed_samples import MostChanged
from rba_compress.reporting.report import page, verdicts
from rba_compress.reporting.report_data import Change, DrawnBlock
from tests.networks import seeded

DIGITS = Architecture(name=ARCHITECTURE, arguments=dict(ARGUMENTS))
CHROMIUM = os.environ.get("RBA_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")

CONTRAST = """() => {
  const light = c => { const [r, g, b] = c.match(/[0-9.]+/g).slice(0, 3).map(v => {
    v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$/.test(c) && c !== 'transparent') return c; } return 'rgb(255, 255, 255)'; };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || e.closest('script') || e.tagName === 'title') continue;
    const style = getComputedStyle(e), ink = e.namespaceURI.endsWith('svg') ? style.fill : style.color;
    const [a, b] = [light(ink), light(behind(e))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.textContent.slice(0, 40)]);
  }
  return found; }"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on the path, and RBA_CHROMIUM names none")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # In a container there is no user namespace for the sandbox.
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def opened(browser: Any, path: Path, **how: Any) -> tuple[Any, list[str]]:
    """Return the page of a file, and every message or fetch of the page that should not be."""
    tab, flaws = browser.new_page(**how), []
    tab.on("console", lambda message: flaws.append(f"console: {message.text}"))
    tab.on("pageerror", lambda error: flaws.append(f"error: {error}"))
    tab.on("dialog", lambda dialog: (flaws.append(f"dialog: {dialog.message}"), dialog.dismiss()))

    def asked(request: Any) -> None:
        if not request.url.startswith(("data:", path.absolute().as_uri())):
            flaws.append(f"fetched: {request.url}")

    tab.on("request", asked)
    tab.goto(path.absolute().as_uri())
    return tab, flaws


@pytest.fixture(scope="module")
def written(result: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    result.report.to_html(path)
    return path


def test_points_and_metrics_answer_to_mouse_and_keyboard(
    browser: Any, written: Path, result: Result
) -> None:
    tab, flaws = opened(browser, written)
    details = result.report.details
    assert details is not None
    rows = [row for row in details.front if row.method == "ours"]
    assert len(rows) == len(result.front) >= 2
    assert [row.method for row in details.front][-1] == "paper"
    points = tab.locator("#charts svg").first.locator("[role=button]")
    assert points.count() == len(details.front)
    # What is shown at first is the network that was chosen.
    share = f"macs={math.ceil(1e4 * rows[-1].macs_kept) / 1e4:g})"
    assert share in tab.locator("#chosen").inner_text()
    points.nth(0).hover()
    assert rows[0].plan in tab.locator("#hovered").inner_text()
    assert share in tab.locator("#chosen").inner_text()
    points.nth(0).click()
    assert (
        f"Budget(macs={math.ceil(1e4 * rows[0].macs_kept) / 1e4:g})"
        in tab.locator("#chosen").inner_text()
    )
    assert points.nth(0).get_attribute("aria-pressed") == "true"
    points.nth(1).focus()
    tab.keyboard.press("Enter")
    assert (
        f"--macs {math.ceil(1e4 * rows[1].macs_kept) / 1e4:g} " in tab.locator("#chosen").inner_text()
    )
    points.nth(len(rows)).click()
    assert "the paper's choice" in tab.locator("#chosen").inner_text()

    assert "cosine" in tab.locator("#heat").inner_text()
    before = tab.locator("#heat rect").nth(1).get_attribute("fill")
    tab.get_by_role("button", name="cka").click()
    assert "linear CKA" in tab.locator("#heat").inner_text()
    assert tab.locator("#heat rect").nth(1).get_attribute("fill") != before
    tab.mouse.move(1, 1)  # else the picture may come to lie under it
    tab.locator("#heat svg").focus()
    tab.keyboard.press("ArrowRight")
    (chain,) = details.chains
    assert "in to 0" in tab.locator("#heat").inner_text()
    value = chain.similarity["cka"][0][1]
    assert f"{value:.3g}" in tab.locator("#heat").inner_text()

    # Everything that can be chosen is reached by the keyboard.
    tab.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(60):
        tab.keyboard.press("Tab")
        reached.add(
            tab.evaluate(
                "document.activeElement.getAttribute('role') || document.activeElement.tagName"
            )
        )
    assert {"button", "BUTTON", "img", "region", "SUMMARY"} <= reached
    assert not flaws


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_by_day_and_by_night_and_on_a_phone(
    browser: Any, written: Path, scheme: str
) -> None:
    tab, flaws = opened(browser, written, color_scheme=scheme, viewport={"width": 390, "height": 800})
    contrasts = tab.evaluate(CONTRAST)
    assert len(contrasts) > 100
    assert min(contrasts)[0] >= 4.5, min(contrasts)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert tab.locator("ul.samples img").count() == 12
    assert tab.locator("ol.chain li").count() == 12
    tab.emulate_media(media="print")
    assert not tab.get_by_role("button", name="cka").is_visible()
    assert not flaws


def test_hostile_names_are_text(browser: Any, result: Result, tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&"
    details = result.report.details
    assert details is not None
    (chain,) = details.chains
    block = DrawnBlock(path=hostile, type=hostile, macs=1, params=1, state="replaced", change=hostile)
    changed = details.model_copy(
        update={
            "chains": (chain.model_copy(update={"name": hostile, "blocks": (block,) * 12}),),
            "front": tuple(row.model_copy(update={"plan": hostile}) for row in details.front),
            "changes": (Change(text=hostile, diagnostics=None),),
            "provenance": {hostile: hostile},
            "options": hostile,
        }
    )
    update = {
        "model": hostile,
        "plan": hostile,
        "details": changed,
        "warnings": (hostile,),
        "samples": hostile,
    }
    result.report.model_copy(update=update).to_html(tmp_path / "hostile.html")
    tab, flaws = opened(browser, tmp_path / "hostile.html")
    tab.locator("#charts [role=button]").first.click()
    tab.locator("#heat svg").focus()
    assert hostile in tab.locator("h1").inner_text()
    assert hostile in tab.locator("#hovered").inner_text()
    assert tab.locator("script").count() == 2
    assert tab.locator("img[src=x]").count() == 0
    assert not flaws


def fidelity_of(**changed: Any) -> Fidelity:
    given = {"samples": 200, "kind": "kl", "divergence": 0.1, "agreement": 0.9, "cosine": 1.0,
             "accuracy_original": 0.8, "accuracy_compressed": 0.79}  # fmt: skip
    return Fidelity(**{**given, **changed})


def test_a_difference_within_its_interval_is_none(result: Result) -> None:
    report = result.report
    timed = report.latency.model_copy(update={"ratio_low": 0.9, "ratio": 1.0, "ratio_high": 1.1})
    within = report.model_copy(
        update={
            "fidelity": fidelity_of(
                drop_low=-0.01, drop_high=0.03, agreement_low=0.85, agreement_high=0.94
            ),
            "latency": timed,
        }
    )
    rows = {row.name: row for row in verdicts(within)}
    assert rows["accuracy"].interval == "-3.0 to +1.0 points"
    assert rows["accuracy"].verdict == "no difference within the interval"
    assert rows["agreement"].verdict == "20 of 200 samples changed class"
    assert rows[f"latency, batch {timed.batch}"].verdict == "no difference"
    lost = report.model_copy(update={"fidelity": fidelity_of(drop_low=0.002, drop_high=0.02)})
    assert {row.name: row.verdict for row in verdicts(lost)}["accuracy"] == "a loss of 1.0 points"
    gained = fidelity_of(accuracy_compressed=0.85, drop_low=-0.08, drop_high=-0.02)
    assert {row.name: row.verdict for row in verdicts(report.model_copy(update={"fidelity": gained}))}[
        "accuracy"
    ] == "a gain of 5.0 points"


def test_the_samples_that_changed_most_are_shown_and_kept_out_of_files(
    result: Result, tmp_path: Path
) -> None:
    images = torch.randn(6, 3, 8, 16)
    original, compressed = torch.zeros(6, 4), torch.zeros(6, 4)
    compressed[:, 1] = torch.tensor([0.0, 3.0, 1.0, 4.0, 2.0, 0.5])
    watch = MostChanged(seeded(torch.nn.Identity), count=3)
    parts = [slice(0, 4), slice(4, 6)]
    labels = torch.arange(6) % 4
    compare_outputs(
        "kl", [(original[p], compressed[p], as_batch((images[p], labels[p]))) for p in parts], watch
    )
    found = watch.found()
    assert [c.label for c in found] == [3, 1, 0]
    assert [(c.original, c.compressed) for c in found] == [(0, 1)] * 3
    drawn = Image.open(io.BytesIO(base64.b64decode(found[0].picture.partition(",")[2])))
    assert drawn.size == (112, 56)
    wanted = ((images[3, 1, 0, 0] * 0.5 + 0.5).clamp(0, 1) * 255).round()
    assert drawn.getpixel((0, 0))[1] == int(wanted)

    assert len(result.report.changed) == 12
    assert all(c.picture for c in result.report.changed)
    result.save(tmp_path / "compressed", architecture=DIGITS)
    assert "base64" not in (tmp_path / "compressed" / "report.json").read_text()
    again = read_report(tmp_path / "compressed")
    assert again is not None
    assert again.details == result.report.details
    assert again.changed == ()


def test_the_report_of_a_directory(
    browser: Any, result: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result.save(tmp_path / "compressed", architecture=DIGITS)
    assert main(["report", str(tmp_path / "compressed")]) == 0
    assert f"written to {tmp_path / 'compressed' / 'report.html'}" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "compressed")]) == 0
    assert load(tmp_path / "compressed")
    tab, flaws = opened(browser, tmp_path / "compressed" / "report.html")
    assert "Samples are in no artefact" in tab.locator("main").inner_text()
    assert tab.locator("#charts svg").count() == 3
    assert not flaws
    text = (tmp_path / "compressed" / "report.json").read_text()
    (tmp_path / "compressed" / "report.json").write_text(text.replace('"macs"', '"macs" '))
    assert main(["report", str(tmp_path / "compressed")]) == 4
    assert "report.json is not what was saved" in capsys.readouterr().err
    (tmp_path / "compressed" / "report.json").unlink()
    assert main(["report", str(tmp_path / "compressed")]) == 4


def test_a_page_that_cannot_be_written_leaves_what_was_there(result: Result, tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(ArtifactError, match=r"cannot write .*report.html"):
        result.report.to_html(tmp_path / "report.html")
    assert not list(tmp_path.glob(".*"))


def test_a_report_without_details_is_a_table(result: Result) -> None:
    old = result.report.model_dump(exclude={"details", "changed"})
    for name in ("agreement_low", "agreement_high", "drop_low", "drop_high"):
        del old["fidelity"][name]
    bare = Report.model_validate(old)
    text = page(bare)
    assert "Before and after" in text
    assert 'id="front"' not in text


def test_the_page_says_what_was_asked_what_is_gone_and_what_to_do_next(
    browser: Any, written: Path, result: Result
) -> None:
    tab, flaws = opened(browser, written)
    text = tab.locator("main").inner_text()
    report = result.report
    kept = report.compressed.macs / report.original.macs
    assert f"MACs of at most 0.85 (reached: {round(kept, 5):.4g})" in text
    assert "Of 12 blocks:" in text
    assert "Nothing was trained" in text
    assert "What to do next" in text
    assert "on 19 samples one of them is 5.3 points" in text.lower()
    details = report.details
    assert details is not None
    boxes = tab.locator("ol.chain li")
    assert boxes.count() == 12
    for k, block in enumerate(details.chains[0].blocks):
        said = boxes.nth(k).inner_text()
        assert all(part in said for part in block.gone)
        assert f"{block.positions} left" in said
    assert any(block.gone for block in details.chains[0].blocks)
    # The last block computes the read position alone.
    assert [block.positions for block in details.chains[0].blocks] == [17] * 11 + [1]
    # Rows of boxes have the same number of them.
    tops = [boxes.nth(k).bounding_box()["y"] for k in range(12)]
    counts = {tops.count(top) for top in tops}
    assert len(counts) == 1
    # A term explains itself to the mouse and to the keyboard.
    tab.locator("abbr").first.focus()
    shown = tab.evaluate("getComputedStyle(document.activeElement, '::after').content")
    assert "share of samples" in shown
    assert not flaws


def test_divergences_are_drawn_on_a_logarithmic_axis(
    browser: Any, written: Path, result: Result
) -> None:
    tab, _ = opened(browser, written)
    details = result.report.details
    assert details is not None
    points = tab.locator("#charts svg").first.locator("circle")
    drawn = [float(points.nth(k).get_attribute("cy")) for k in range(points.count())]
    values = [row.divergence for row in details.front if row.method == "ours"]
    floor = 1e-8
    logs = [math.log10(max(v or 0.0, floor)) for v in values]
    pairs = [(a, b) for a, b in zip(logs, drawn, strict=True) if a > -8]
    slopes = {round((b - d) / (a - c), 1) for a, b in pairs for c, d in pairs if abs(a - c) > 0.1}
    assert len(slopes) <= 1


def test_limits_that_were_reached_are_said_in_their_units(result: Result) -> None:
    details = result.report.details
    assert details is not None
    budget = Budget(macs=9_000_000, latency=0.9, agreement=0.5, divergence=0.2)
    text = page(
        result.report.model_copy(update={"details": details.model_copy(update={"budget": budget})})
    )
    assert f"MACs of at most 9,000,000 (reached: {result.report.compressed.macs:,})" in text
    assert "latency of at most 0.9 (reached: " in text
    assert "agreement of at least 0.5" in text
