"""Norms and spectra of weight differences from their small factors, without forming them.

For W = B A with rank r, the squared singular values are the eigenvalues of (A Aᵀ)(Bᵀ B), two r x r
matrices; for a Kronecker product they are the products of the factors' singular values.
"""

from __future__ import annotations

import numpy as np

# Above this width of the Gram matrices a spectrum costs more than it tells.
MAX_WIDTH = 1024


def singular_values(factors: dict[str, np.ndarray]) -> np.ndarray | None:
    """Singular values (descending, without the alpha scale) of a module's weight difference.

    `factors` by role, as in `LoraModule.tensors`. Convolutions are read as (out, in·kh·kw). DoRA:
    of the low-rank part. None where it would be too costly.
    """
    if "down" in factors:
        up, down = _flat(factors["up"]), factors["down"]
        if "mid" in factors:
            down = np.einsum("ijkl,jr->irkl", factors["mid"], _flat(down))
        return _of_product(up, _flat(down))
    if "hada_w1_a" in factors:
        return _of_hadamard(factors)
    first, second = _kron_factor(factors, "lokr_w1"), _kron_factor(factors, "lokr_w2")
    if first is None or second is None:
        return None
    return np.sort(np.outer(first, second).ravel())[::-1]


def effective_rank(values: np.ndarray) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli, 2007); 0 if all zero."""
    total = values.sum()
    if not total > 0:
        return 0.0
    p = values[values > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(array.shape[0], -1)


def _of_product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of left @ right, (m, r) @ (r, n)."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    return _of_grams(left.T @ left, right @ right.T, min(left.shape[0], right.shape[1]))


def _of_grams(left: np.ndarray, right: np.ndarray, limit: int) -> np.ndarray:
    """From the Gram matrices Bᵀ B and A Aᵀ; at most `limit` are not zero, whatever the rank."""
    values, vectors = np.linalg.eigh(right)
    root = vectors * np.sqrt(np.clip(values, 0, None))
    squared = np.linalg.eigvalsh(root.T @ left @ root)[::-1][:limit]
    return np.sqrt(np.clip(squared, 0, None))


def _of_matrix(matrix: np.ndarray) -> np.ndarray | None:
    if min(matrix.shape) > MAX_WIDTH:
        return None
    matrix = matrix.astype(np.float64)
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return np.sqrt(np.clip(np.linalg.eigvalsh(gram)[::-1], 0, None))


def _kron_factor(factors: dict[str, np.ndarray], name: str) -> np.ndarray | None:
    if name in factors:
        return _of_matrix(_flat(factors[name]))
    a, b = factors[f"{name}_a"], factors[f"{name}_b"]
    if name == "lokr_w2" and "lokr_t2" in factors:
        return _of_product(a.T, _flat(np.einsum("ijkl,jr->irkl", factors["lokr_t2"], b)))
    return _of_product(a, b)


def _of_hadamard(factors: dict[str, np.ndarray]) -> np.ndarray | None:
    sides = []
    for i in ("1", "2"):
        left, right = factors[f"hada_w{i}_a"], factors[f"hada_w{i}_b"]
        core = factors.get(f"hada_t{i}")
        if core is not None:
            left, right = left.T, _flat(np.einsum("ijkl,jr->irkl", core, right))
        sides.append((left, right))
    (a1, b1), (a2, b2) = sides
    if a1.shape[1] * a2.shape[1] > MAX_WIDTH:
        return None
    # (A1 B1) ∘ (A2 B2) = (rows of A1 ⊗ rows of A2)(columns of B1 ⊗ columns of B2), of rank r².
    return _of_grams(_row_gram(a1, a2), _row_gram(b1.T, b2.T), min(len(a1), b1.shape[1]))


def _row_gram(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Gram matrix (r², r²) of the matrix whose rows are first[i] ⊗ second[i], in slices of rows."""
    width = first.shape[1] * second.shape[1]
    gram = np.zeros((width, width))
    step = max(1, (1 << 20) // width)
    for at in range(0, len(first), step):
        a, b = first[at : at + step].astype(np.float64), second[at : at + step].astype(np.float64)
        rows = (a[:, :, None] * b[:, None, :]).reshape(len(a), -1)
        gram += rows.T @ rows
    return gram


def cost(shapes: dict[str, tuple[int, ...]]) -> float:
    """About how many floating-point operations `singular_values` takes, from {role: shape}."""
    sizes = {role: float(np.prod(shape)) for role, shape in shapes.items()}
    if "down" in shapes:
        return _gram_cost(shapes["down"][0], sum(sizes.values()))
    if "hada_w1_a" in shapes:
        width = shapes["hada_w1_b"][0] * shapes["hada_w2_b"][0]
        # Each of the two sides becomes as wide as the product of its ranks.
        grown = sum(sizes.values()) / (shapes["hada_w1_b"][0] + shapes["hada_w2_b"][0]) * width
        return _gram_cost(width, grown) if width <= MAX_WIDTH else 0.0
    total = 0.0
    for role, shape in shapes.items():
        width = min(shape[0], int(sizes[role] / max(1, shape[0])))
        total += _gram_cost(width, sizes[role]) if width <= MAX_WIDTH else 0.0
    return total


def _gram_cost(width: int, elements: float) -> float:
    # Two Gram matrices, then two eigen-decompositions.
    return 2.0 * width * elements + 10.0 * width**3
