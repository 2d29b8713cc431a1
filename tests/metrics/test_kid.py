"""KID against loops, closed forms of Gaussians and literal leave-one-out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import t

from diffward.errors import InputError
from diffward.metrics import METRICS
from diffward.metrics import kid as module
from diffward.metrics.kid import kid
from diffward.metrics.metric import Estimate
from diffward.metrics.paired import kid_difference

Gaussian = tuple[np.ndarray, np.ndarray]  # mean (d,), standard deviations (d,)


def mean_kernel(p: Gaussian, q: Gaussian) -> float:
    """E (x.y/d + 1)^3 of independent x ~ p, y ~ q, from the moments of Gaussians (Isserlis)."""
    (m, s), (n, r) = p, q
    d, v, w = len(m), s**2, r**2
    dot, both = m @ n, v @ w
    second = dot**2 + m**2 @ w + n**2 @ v + both
    third = dot**3 + 3 * dot * (m**2 @ w + n**2 @ v + both) + 6 * (m * v * w) @ n
    return 1 + 3 * dot / d + 3 * second / d**2 + third / d**3


def mmd2(p: Gaussian, q: Gaussian) -> float:
    return mean_kernel(p, p) + mean_kernel(q, q) - 2 * mean_kernel(p, q)


def gaussian(shift: float = 0.0, scale: float = 1.0, d: int = 16) -> Gaussian:
    return np.full(d, 0.3 + shift), scale * np.linspace(0.3, 1.5, d)


def draw(p: Gaussian, n: int, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(*p, (n, len(p[0])))


def misses(estimate: Callable[[np.random.Generator], Estimate], truth: float, runs: int) -> float:
    found = [estimate(np.random.default_rng(seed)) for seed in range(runs)]
    error = np.mean([e.value for e in found]) - truth
    assert abs(error) < 4 * np.std([e.value for e in found]) / np.sqrt(runs), "biased"
    return float(np.mean([not e.interval[0] <= truth <= e.interval[1] for e in found]))


def without_each(figure: Callable[..., float], *sets: np.ndarray) -> list[np.ndarray]:
    """The figure computed anew without each row of each set."""
    return [
        np.array(
            [
                figure(*sets[:k], np.delete(rows, i, axis=0), *sets[k + 1 :])
                for i in range(len(rows))
            ]
        )
        for k, rows in enumerate(sets)
    ]


def half_width(without: list[np.ndarray]) -> float:
    """Of the 95 % interval that textbooks give for leave-one-out figures of independent samples."""
    variance = sum((len(w) - 1) / len(w) * ((w - w.mean()) ** 2).sum() for w in without)
    return float(t.ppf(0.975, min(len(w) for w in without) - 1) * np.sqrt(variance))


@pytest.mark.parametrize("chunk", [4_000_000, 20])
def test_kid_is_the_mean_over_pairs(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 3)), rng.normal(1, 1, size=(9, 3))

    def mean(x: np.ndarray, y: np.ndarray, same: bool) -> float:
        pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if not (same and i == j)]
        return float(np.mean([(sum(x[i] * y[j]) / 3 + 1) ** 3 for i, j in pairs]))

    found = kid(a, b)
    assert found.value == pytest.approx(mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False))
    assert (found.n_a, found.n_b) == (7, 9)
    assert kid(b, a).value == pytest.approx(found.value)


def test_the_interval_is_that_of_leaving_each_picture_out() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(6, 3)), rng.normal(1, 1, size=(9, 3))
    found = kid(a, b)
    half = half_width(without_each(lambda x, y: kid(x, y).value, a, b))
    assert found.interval == pytest.approx((found.value - half, found.value + half))


@pytest.mark.parametrize(
    ("other", "n", "m"),
    [(gaussian(), 40, 40), (gaussian(0.1, 1.05), 40, 40), (gaussian(0.5), 30, 120)],
)
def test_kid_covers_the_truth(other: Gaussian, n: int, m: int) -> None:
    one = gaussian()

    def estimate(rng: np.random.Generator) -> Estimate:
        return kid(draw(one, n, rng), draw(other, m, rng))

    assert misses(estimate, mmd2(one, other), 300) <= 0.08


def test_the_interval_is_not_wide_for_nothing() -> None:
    """Where two sets differ about 5 of 100 intervals must miss; none would if they were too wide."""
    one, other = gaussian(), gaussian(0.5)

    def estimate(rng: np.random.Generator) -> Estimate:
        return kid(draw(one, 100, rng), draw(other, 100, rng))

    assert 0.02 <= misses(estimate, mmd2(one, other), 300) <= 0.08
    rng = np.random.default_rng(0)
    a, b = draw(one, 100, rng), draw(other, 100, rng)
    assert np.diff(kid(a, b, level=0.5).interval) < 0.5 * np.diff(kid(a, b).interval)


@pytest.mark.parametrize("paired", [True, False])
def test_the_difference_of_two_kids(paired: bool) -> None:
    rng = np.random.default_rng(2)
    a, b, real = (draw(gaussian(s), 8, rng) for s in (0.2, 0.5, 0))

    def figure(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> float:
        return kid(x, r).value - kid(y, r).value

    found = kid_difference(a, b, real, paired=paired)
    assert found.value == pytest.approx(figure(a, b, real))
    assert found.value == pytest.approx(-kid_difference(b, a, real, paired=paired).value)
    if paired:
        pairs = np.concatenate([a, b], axis=1)
        without = without_each(lambda ab, r: figure(*np.split(ab, 2, axis=1), r), pairs, real)
    else:
        without = without_each(figure, a, b, real)
    half = half_width(without)
    assert found.interval == pytest.approx((found.value - half, found.value + half))


@pytest.mark.parametrize("paired", [True, False])
def test_the_difference_covers_the_truth(paired: bool) -> None:
    """Paired sets share their noise, as pictures drawn from the same seeds do."""
    real, a, b = gaussian(), gaussian(0.2), gaussian(0.3, 1.1)

    def estimate(rng: np.random.Generator) -> Estimate:
        noise = draw(gaussian(-0.3), 40, rng)
        other = noise if paired else draw(gaussian(-0.3), 60, rng)
        x, y = a[0] + noise, b[0] + 1.1 * other
        return kid_difference(x, y, draw(real, 40, rng), paired=paired)

    assert misses(estimate, mmd2(a, real) - mmd2(b, real), 300) <= 0.08


def test_pairs_sharpen_the_difference() -> None:
    rng = np.random.default_rng(3)
    real = draw(gaussian(), 60, rng)
    x = draw(gaussian(0.3), 60, rng)
    y = x + 0.05 * rng.normal(size=x.shape)
    paired, apart = (kid_difference(x, y, real, paired=p).interval for p in (True, False))
    assert np.diff(paired) < 0.3 * np.diff(apart)
    same = kid_difference(x, x, real)
    assert (same.value, *same.interval) == pytest.approx((0, 0, 0))


@pytest.mark.parametrize(
    ("a", "said"),
    [
        (np.zeros((2, 4)), "a: 2 pictures; at least 3"),
        (np.zeros(4), "a: must be of shape"),
        (np.full((5, 4), np.nan), "a: 5 of 5 rows are NaN"),
        (np.zeros((5, 3)), "b: 4 dimensions where others have 3"),
    ],
)
def test_what_cannot_be_compared_is_said(a: np.ndarray, said: str) -> None:
    with pytest.raises(InputError, match=said):
        kid(a, np.zeros((5, 4)))


def test_pairs_must_match() -> None:
    with pytest.raises(InputError, match="3 and 4 generated pictures are no pairs"):
        kid_difference(np.zeros((3, 2)), np.zeros((4, 2)), np.zeros((5, 2)))


def test_metrics_are_listed_with_paper_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from diffward.commands.listing import listing

    listing("metrics", json=True)
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(METRICS.names()) == {"kid", "fid"}
    assert all(row["paper"] and row["cost"] and row["access"] for row in rows.values())
