"""Quadratic forms of divergences against finite changes of the divergences themselves."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rba_compress.core.batch import Batch
from rba_compress.core.plan import ComparedOutput
from rba_compress.profiling.fidelity import Criterion
from rba_compress.profiling.quadratic_form import CLASSES, changes, likeliest, of_classes


def criterion(kind: str, **how: Any) -> Criterion:
    return Criterion(kind, None, (ComparedOutput(name="y", divergence=kind, **how),))


def batch(n: int, mask: Tensor | None = None) -> Batch:
    keywords = {} if mask is None else {"attention_mask": mask}
    return Batch((torch.zeros(n, 1),), keywords, None)


def mixed(how: Criterion, given: Batch, before: Any, ends: tuple[Any, Any], expected: Any) -> float:
    """Sum over rows of the inner products of two changes."""
    one, other = (changes(how, expected, before, after, given) for after in ends)
    assert one is not None and other is not None
    return sum(float((x.rows * y.dual).sum()) for x, y in zip(one, other, strict=True))


def finite(
    how: Criterion, given: Batch, before: Tensor, along: list[Tensor], expected: Tensor
) -> float:
    """Mixed second difference of the divergence along two changes, summed over samples."""
    h = 1e-3

    def at(s: float, t: float) -> float:
        after = before + s * along[0] + t * along[1]
        return float(how({"y": expected}, {"y": after}, given).sum())

    return (at(h, h) - at(h, -h) - at(-h, h) + at(-h, -h)) / (4 * h * h)


CASES = {
    "class scores": ("kl", (4, 7), {}, None),
    "token scores": ("kl", (3, 5, 6), {}, None),
    "token scores with padding": ("kl", (3, 5, 6), {}, [5, 2, 3]),
    "labels": ("bernoulli", (4, 3), {}, None),
    "one number a sample": ("nse", (4,), {"scale": 0.7}, None),
    "one label a sample": ("bernoulli", (4,), {}, None),
    "a squared error": ("nse", (4, 6), {}, None),
    "a squared error with a scale": ("nse", (4, 5, 6), {"scale": 0.7}, None),
    "a squared error with padding": ("nse", (3, 5, 6), {"scale": 0.7}, [5, 2, 3]),
}


@pytest.mark.parametrize("case", CASES)
def test_inner_products_are_the_second_derivative(case: str) -> None:
    """Inner products are second derivatives at a network away from the original, too."""
    kind, shape, settings, lengths = CASES[case]
    drawn = torch.Generator().manual_seed(0)
    expected, gap, u, v = (torch.randn(shape, generator=drawn, dtype=torch.float64) for _ in range(4))
    before = expected + gap / 3
    mask = None
    if lengths is not None:
        mask = (torch.arange(shape[1])[None] < torch.tensor(lengths)[:, None]).long()
    how, given = criterion(kind, **settings), batch(shape[0], mask)
    small = 1e-3
    found = mixed(
        how,
        given,
        {"y": before},
        ({"y": before + small * u}, {"y": before + small * v}),
        {"y": expected},
    )
    wanted = finite(how, given, before, [u, v], expected)
    assert found / small**2 == pytest.approx(wanted, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("kind", ["kl", "bernoulli"])
def test_probabilities_are_taken_back_to_scores(kind: str) -> None:
    drawn = torch.Generator().manual_seed(1)
    x, u, v = (torch.randn(4, 5, generator=drawn, dtype=torch.float64) for _ in range(3))
    link = torch.softmax if kind == "kl" else lambda t, _: torch.sigmoid(t)
    scores = mixed(criterion(kind), batch(4), {"y": x}, ({"y": x + u}, {"y": x + v}), {"y": x})
    shares = [{"y": link(t, -1)} for t in (x, x + u, x + v, x)]
    assert mixed(
        criterion(kind, probabilities=True), batch(4), shares[0], (shares[1], shares[2]), shares[3]
    ) == pytest.approx(scores, rel=1e-6)


def test_cosines_are_exact_for_any_change() -> None:
    """The form of a change from the original equals the divergence 1 - cos = ||x^ - y^||^2 / 2."""
    drawn = torch.Generator().manual_seed(2)
    x, u = (torch.randn(4, 9, generator=drawn, dtype=torch.float64) for _ in range(2))
    how = criterion("cosine")
    exact = float(how({"y": x}, {"y": x + u}, batch(4)).sum())
    after = {"y": x + u}
    assert mixed(how, batch(4), {"y": x}, (after, after), {"y": x}) / 2 == pytest.approx(
        exact, rel=1e-9
    )


def test_a_function_has_the_products_with_its_second_derivative() -> None:
    """Quartic divergence, whose second derivative is known."""

    def quartic(a: Any, b: Any, _: Batch) -> Tensor:
        return (b - a).pow(4).sum(1)

    how = Criterion("given", quartic)
    drawn = torch.Generator().manual_seed(3)
    x, gap, u, v = (torch.randn(4, 5, generator=drawn, dtype=torch.float64) for _ in range(4))
    before = x + gap
    found = mixed(how, batch(4), before, (before + u, before + v), x)
    assert found == pytest.approx(float((12 * gap.square() * u * v).sum()), rel=1e-9)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b, _: (a.argmax(1) != b.argmax(1)).double(),
        lambda a, b, _: torch.from_numpy((b - a).abs().sum(1).numpy()),
    ],
    ids=["a count", "numpy"],
)
def test_a_function_without_derivative_has_no_form(function: Any) -> None:
    x = torch.randn(4, 5)
    assert changes(Criterion("given", function), x, x, x + 1, batch(4)) is None


def test_the_likeliest_classes_of_a_vocabulary_stand_for_all() -> None:
    """On scores as peaked as a language model's: the others hardly count."""
    generator = torch.Generator().manual_seed(0)
    before, one, two = (torch.randn(2, 8, 6000, generator=generator) for _ in range(3))
    before, two = 5 * before, one + 0.5 * two
    how, given = criterion("kl"), batch(2)
    classes = likeliest(how, {"y": before})
    assert {name: index.shape for name, index in classes.items()} == {"y": (2, 8, CLASSES)}
    outputs = [{"y": before}, {"y": before + 0.1 * one}, {"y": before + 0.1 * two}]
    whole = mixed(how, given, outputs[0], (outputs[1], outputs[2]), outputs[0])
    few = [of_classes(output, classes) for output in outputs]
    found = mixed(how, given, few[0], (few[1], few[2]), few[0])
    assert found == pytest.approx(whole, rel=0.03)
    assert not likeliest(how, {"y": before[..., :1000]})
    assert not likeliest(criterion("nse"), {"y": before})
