"""Fréchet distance of two sets of features, as if both were Gaussian."""

from __future__ import annotations

import numpy as np

from diffward.errors import InputError
from diffward.metrics.metric import METRICS, Vectors, check_features


@METRICS.register(
    "fid",
    paper="Heusel et al. 2017 (arXiv 1706.08500); Dowson & Landau 1982",
    access="features of two sets of pictures, more pictures in each than features",
    cost="(n + m) d^2 + d^3",
)
def fid(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of two Gaussians with the means and covariances of the sets; biased upwards.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), S with n - 1. tr (S_a S_b)^(1/2) is the sum of the singular values of R_a R_b', where S = R'R from a QR of the
    centred features: real and not negative by construction, also for singular S, and no covariance
    is formed, so that small eigenvalues keep their digits. Compare only figures of the same
    features and the same n.

    Args:
        a, b: features (n, d) and (m, d), one picture a row.

    Raises:
        InputError: no more pictures than features, another shape, or values that are not finite.
    """
    a, b = check_features(2, a=a, b=b)
    d = a.shape[1]
    if min(len(a), len(b)) <= d:
        raise InputError(
            f"FID of {d} features needs more than {d} pictures in each set, there are {len(a)} and "
            f"{len(b)}: give more, or take KID, which has no such need"
        )
    root_a, root_b = _root(a), _root(b)
    shared = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    shift = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum()
    # Equal sets leave a rounding error, which may lie below 0.
    return float(max(0.0, shift + (root_a**2).sum() + (root_b**2).sum() - 2 * shared))


def _root(x: Vectors) -> Vectors:
    """R (d, d) with R'R the covariance of x (n, d)."""
    return np.linalg.qr(x - x.mean(axis=0), mode="r") / np.sqrt(len(x) - 1)
