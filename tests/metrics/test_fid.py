"""FID against the closed form for Gaussians whose moments are exact, and against scipy's sqrtm."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from diffward.errors import InputError
from diffward.metrics.fid import fid


def exact(mean: np.ndarray, root: np.ndarray, n: int, seed: int) -> np.ndarray:
    """n rows whose sample mean is `mean` and whose sample covariance is root' root, exactly."""
    x = np.random.default_rng(seed).normal(size=(n, len(mean)))
    x -= x.mean(axis=0)
    x = np.linalg.solve(np.linalg.cholesky(np.cov(x.T)), x.T).T
    return mean + x @ root


def test_the_closed_form_where_covariances_commute() -> None:
    """|mu_a - mu_b|^2 + sum (s_a - s_b)^2 with standard deviations s along shared axes."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    one, two = np.array([1, 2, 3, 0.5, 0.1]), np.array([2, 1, 3, 1e-5, 4])
    mean = rng.normal(size=5)
    a = exact(mean, np.diag(one) @ axes, 40, 1)
    b = exact(mean + np.array([1, 0, 0, 2, 0]), np.diag(two) @ axes, 30, 2)
    assert fid(a, b) == pytest.approx(5 + ((one - two) ** 2).sum(), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_sqrtm(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(60, 12)) @ rng.normal(size=(12, 12))
    b = rng.normal(1, 1, size=(50, 12)) @ rng.normal(size=(12, 12))
    s, r = np.cov(a.T), np.cov(b.T)
    root = sqrtm(s @ r).real
    truth = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + r - 2 * root)
    assert fid(a, b) == pytest.approx(truth, rel=1e-6)
    assert fid(b, a) == pytest.approx(truth, rel=1e-6)


def test_singular_covariances_are_no_trouble() -> None:
    """x -> (x, x, 0) is sqrt(2) times an isometry: the distance doubles. sqrtm loses its way here."""
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(40, 6)), rng.normal(0.5, 2, size=(50, 6))
    flat = [np.concatenate([x, x, np.zeros_like(x)], axis=1) for x in (a, b)]
    assert fid(*flat) == pytest.approx(2 * fid(a, b), rel=1e-9)


def test_a_set_is_at_no_distance_from_itself() -> None:
    a = np.random.default_rng(5).normal(100, 3, size=(50, 20))
    assert 0 <= fid(a, a[::-1]) < 1e-9
    assert fid(a, a + 2) == pytest.approx(20 * 4)


def test_more_pictures_than_features_are_needed() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(9, 8)), rng.normal(size=(8, 8))
    with pytest.raises(InputError, match=r"8 features needs more than 8 pictures .* 9 and 8"):
        fid(a, b)
    assert np.isfinite(fid(a, rng.normal(size=(9, 8))))
