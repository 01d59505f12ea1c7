"""The clinical application: each rule once, on small tables; the real records from end to end, slow."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.real_data import data_root
from rba_compress import supports

pd = pytest.importorskip("pandas")
pytest.importorskip("pandera")

from benchmarks.clinical.analysis import clusters, hba1c, lifts, rates  # noqa: E402
from benchmarks.clinical.cleaning import ENDED, chapter, clean, first_stays  # noqa: E402
from benchmarks.clinical.intervals import SMALLEST, by_patient, share  # noqa: E402
from benchmarks.clinical.pipeline import Pipeline, Run, main, shown  # noqa: E402
from benchmarks.clinical.prediction import (  # noqa: E402
    Encoding,
    FTTransformer,
    Training,
    net_benefit,
    parts,
    scored,
    train,
)
from benchmarks.clinical.schema import (  # noqa: E402
    CODES,
    COLUMNS,
    DRUGS,
    ENCOUNTERS,
    ClinicalError,
    read_tables,
    validated,
)

MEANINGS = (
    "admission_type_id,description\n1,Emergency\n2,Urgent\n6,NULL\n,\n"
    "discharge_disposition_id,description\n1,Discharged to home\n11,Expired\n18,NULL\n,\n"
    "admission_source_id,description\n1, Physician Referral\n7, Emergency Room\n9, Not Available\n"
)


def records(rows: int = 400, seed: int = 0) -> Any:
    """A table that keeps every rule; those with more stays before are readmitted more often."""
    draw = np.random.default_rng(seed)
    table = {}
    for column in COLUMNS:
        if column.values:
            options = [*column.values, *column.missing]
        elif column.pattern:
            options = ["250.02", "428", "V45", "E888", "?"] if "diag" in column.name else ["MC", "?"]
        else:
            low, high = column.low or 0, min(column.high or 0, 14)
            options = [str(k) for k in range(low, high + 1)]
        table[column.name] = draw.choice(options, rows)
    table["encounter_id"] = [str(1000 + k) for k in draw.permutation(rows)]
    table["patient_nbr"] = [str(k) for k in draw.integers(1, rows // 2, rows)]
    table["gender"] = draw.choice(["Female", "Male"], rows)
    for name, codes in (
        ("admission_type_id", "126"),
        ("discharge_disposition_id", ("1", "11", "18")),
        ("admission_source_id", "179"),
    ):
        table[name] = draw.choice([*codes], rows)
    before = draw.integers(0, 8, rows)
    table["number_inpatient"] = [str(k) for k in before]
    again = draw.random(rows) < 0.05 + 0.1 * before
    table["readmitted"] = np.where(again, "<30", "NO")
    for drug in DRUGS[3:]:
        table[drug] = ["No"] * rows
    return pd.DataFrame(table, dtype=str)


def zipped(path: Path, encounters: str, codes: str = MEANINGS) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"folder/{ENCOUNTERS}", encounters)
        archive.writestr(CODES, codes)
    return path


def test_a_table_that_keeps_every_rule_is_read_as_it_is(tmp_path: Path) -> None:
    table = records(50)
    read, codes = read_tables(zipped(tmp_path / "a.zip", table.to_csv(index=False)))
    assert read.equals(table)
    assert codes["admission_source_id"]["1"] == "Physician Referral"
    assert len(COLUMNS) == 50
    assert len(DRUGS) == 23


def changed(name: str, value: str, rows: int) -> Any:
    table = records(20)
    table.loc[table.index[:rows], name] = value
    return table


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (lambda: records(20).drop(columns="age"), "lacks the column 'age'"),
        (lambda: records(20).assign(smoker="No"), "has a column 'smoker' that is not known"),
        (
            lambda: changed("race", "Martian", 2),
            r"column 'race' must hold one of Caucasian.*; 2 rows do not \(row 0: 'Martian', row 1",
        ),
        (lambda: changed("num_medications", "many", 7), r"whole number from 0 to 200; 7 rows.*row 4: "),
        (lambda: changed("time_in_hospital", "15", 1), r"from 1 to 14; 1 rows do not \(row 0: '15'\)"),
        (lambda: changed("diag_2", "25O.1", 1), "column 'diag_2' must hold text like"),
        (
            lambda: changed("encounter_id", "7", 3),
            r"'encounter_id' must hold each once; 3 rows do not \(row 0: '7'",
        ),
        (lambda: records(20).iloc[:0], "has no rows"),
    ],
)
def test_a_table_that_breaks_a_rule_is_refused(table: Any, message: str) -> None:
    with pytest.raises(ClinicalError, match=message):
        validated(table())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no zip", "is not a readable zip file"),
        (b"", "is not a readable zip file"),
        ("", f"{ENCOUNTERS} is no table"),
        ("a,b\n1,2,3\n", "is no table|lacks the column"),
    ],
)
def test_a_file_that_is_none_is_refused_and_nothing_is_written(
    content: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.zip"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        zipped(path, content)
    with pytest.raises(ClinicalError, match=message):
        Pipeline(Run(out=tmp_path / "out", records=path)).run()
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    with pytest.raises(SystemExit, match="a.zip"):
        main(["--records", str(path), "--out", str(tmp_path / "out")])
    whole = zipped(tmp_path / "b.zip", records(20).to_csv(index=False)).read_bytes()
    (tmp_path / "b.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ClinicalError, match="b.zip is not a readable zip file"):
        read_tables(tmp_path / "b.zip")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr(ENCOUNTERS, "")
    with pytest.raises(ClinicalError, match=f"has no {CODES}"):
        read_tables(tmp_path / "c.zip")
    with pytest.raises(ClinicalError, match="no table of admission_source_id"):
        read_tables(zipped(tmp_path / "d.zip", records(5).to_csv(index=False), MEANINGS[:150]))


def codes_of(tmp_path: Path) -> Any:
    return read_tables(zipped(tmp_path / "m.zip", records(5).to_csv(index=False)))[1]


def test_rows_in_are_rows_kept_and_rows_of_the_log(tmp_path: Path) -> None:
    raw = records(300)
    raw = pd.concat([raw, raw.iloc[:4].assign(encounter_id=["1", "2", "3", "4"])], ignore_index=True)
    raw.loc[10, "gender"] = "Unknown/Invalid"
    cleaned = clean(raw, codes_of(tmp_path))
    log = {entry.rule: entry.count for entry in cleaned.audit}
    assert cleaned.rows_in == 304 == len(cleaned.table) + cleaned.removed
    assert log["repeated rows"] == 4
    left = raw.iloc[:300]
    ended = left["discharge_disposition_id"].isin(ENDED) & (left["gender"] != "Unknown/Invalid")
    assert log["death or hospice"] == ended.sum()
    assert log["race missing"] == (cleaned.table["race"] == "unknown").sum()
    assert log["examide never given"] == len(cleaned.table)
    assert not {"encounter_id", "patient_nbr", "weight", "examide"} & set(cleaned.table)
    assert not cleaned.table.isna().any().any()
    first = first_stays(cleaned)
    assert first.rows_in == len(first.table) + first.removed
    assert first.table["patient"].is_unique
    again = clean(raw, codes_of(tmp_path))
    assert again.table.equals(cleaned.table)
    assert again.audit == cleaned.audit
    assert all(entry.count >= SMALLEST for entry in shown(cleaned.audit))
    merged = next(e for e in shown(cleaned.audit) if "death" in e.rule)
    assert merged.count == log["repeated rows"] + log["sex not recorded"] + log["death or hospice"]


def test_codes_are_grouped_by_their_chapter() -> None:
    expected = {
        "250.83": "diabetes", "249": "endocrine", "276": "endocrine", "428": "circulatory", "8": "infectious",
        "V45": "supplementary", "E888": "external cause", "?": "unknown", "998.1": "injury and poisoning",
    }  # fmt: skip
    assert {code: chapter(code) for code in expected} == expected


def test_no_patient_is_in_two_parts_and_intervals_are_of_patients() -> None:
    patients = np.random.default_rng(0).integers(0, 200, 900)
    patients = pd.factorize(patients)[0]
    found = parts(patients)
    seen = [set(patients[rows]) for rows in (found.train, found.choose, found.test)]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    assert sum(len(rows) for rows in (found.train, found.choose, found.test)) == 900
    # All rows of a patient are alike: intervals of rows would be as narrow as of nine times as many.
    values = np.random.default_rng(1).normal(size=200)[patients]
    wide = by_patient(lambda rows: float(values[rows].mean()), patients)
    assert wide.low < values.mean() < wide.high
    assert wide.high - wide.low == pytest.approx(4 / np.sqrt(200), rel=0.35)
    half = share(50, 100)
    assert (half.low, half.high) == pytest.approx((0.404, 0.596), abs=1e-3)


def test_small_cells_are_not_shown(tmp_path: Path) -> None:
    table = first_stays(clean(records(1500), codes_of(tmp_path))).table
    found = lifts(table)
    assert found
    assert all(one.count >= SMALLEST for one in found)
    assert all(one.lift.low <= one.lift.value <= one.lift.high for one in found)
    few = pd.Series(np.where(np.arange(len(table)) < 12, "few", "many"))
    assert [rate.group for rate in rates(table, few)] == ["many"]
    assert {"measured", "not measured"} == {r.group for r in hba1c(table)["HbA1c measured or not"]}
    grouped = clusters(table, choices=range(2, 4))
    assert grouped.chosen in (2, 3)
    assert len(grouped.centres) == grouped.chosen


def test_acting_is_worth_what_the_formula_says() -> None:
    y, scores = np.array([1, 0, 1, 0, 0]), np.array([0.9, 0.8, 0.3, 0.1, 0.2])
    assert net_benefit(y, scores, 0.5) == pytest.approx(1 / 5 - 1 / 5)
    assert net_benefit(y, scores, 0.25) == pytest.approx(2 / 5 - 1 / 5 / 3)


@pytest.mark.slow
def test_the_transformer_learns_repeats_itself_and_has_blocks_to_replace(tmp_path: Path) -> None:
    table = clean(records(2000), codes_of(tmp_path)).table
    found = parts(table["patient"].to_numpy())
    encoding = Encoding.of(table.iloc[found.train])
    x, y = encoding.of_table(table), table["readmitted"].to_numpy()
    assert not {"patient", "stay", "readmitted"} & set(encoding.values)
    unseen = encoding.of_table(table.iloc[:1].assign(race="of another kind"))
    assert unseen[0, 8 + list(encoding.values).index("race")] == 0
    how = Training(epochs=8, batch=64, rate=3e-3)
    state = torch.random.get_rng_state()
    model = train(x, y, found, encoding.sizes, how)
    assert torch.equal(torch.random.get_rng_state(), state)
    scores = scored(model, x[found.test])
    assert roc_auc_score(y[found.test], scores) > 0.65
    assert np.array_equal(scored(train(x, y, found, encoding.sizes, how), x[found.test]), scores)
    (chain,) = supports(FTTransformer(8, encoding.sizes).eval(), torch.from_numpy(x[:16])).chains
    assert len(chain.blocks) == 6


@pytest.mark.slow
def test_a_fifth_of_the_real_patients_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.clinical.intervals.TIMES", 50)
    real = data_root() / "diabetes130.zip"
    if not real.exists():
        pytest.skip(f"{real} is not there")
    table, _ = read_tables(real)
    table = table[table["patient_nbr"].astype(int) % 5 == 0]
    with zipfile.ZipFile(real) as archive:
        codes = archive.read(next(n for n in archive.namelist() if n.endswith(CODES))).decode()
    path = zipped(tmp_path / "fifth.zip", table.to_csv(index=False), codes)
    asked = ["--records", str(path), "--out", str(tmp_path / "out"), "--training.epochs", "2"]
    main([*asked, "--kept", "0.7"])
    done = Pipeline(Run(out=tmp_path / "out", records=path, kept=0.7, training=Training(epochs=2)))
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("stage.json")}
    assert len(written) == 4
    assert done.cleaning.rows_in == len(table)
    assert all(0.56 < model.auroc.value < 0.72 for model in done.prediction.models)
    assert done.compression.macs[1] <= 0.7 * done.compression.macs[0]
    assert abs(done.compression.auroc_difference.value) < 0.005
    assert {p: p.stat().st_mtime_ns for p in written} == written  # nothing was done again
    tests = done.scores()
    truth = done.encoded[1][done.parts.test]
    for model in done.prediction.models:
        assert roc_auc_score(truth, tests[model.model]) == pytest.approx(model.auroc.value)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Not a medical device" in page
    assert "http" not in page
