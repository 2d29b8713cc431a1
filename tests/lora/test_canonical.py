"""The canonical form is the change's own: numpy's SVD of the dense matrix, however it is factored or stored."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffward.errors import InputError
from diffward.lora import LoraModule, LoraWeights, canonical_factors, canonical_module, open_lora
from diffward.lora.canonical import canonical_matrix
from diffward.lora.write import write_lora

from .helpers import BLOCK, TARGETS, factors

NAME = f"unet.{BLOCK}.attn2.to_k"


def same(found, truth, tolerance=1e-5):
    for role in ("u", "sigma", "v"):
        ours, theirs = getattr(found, role), getattr(truth, role)
        scale = float(truth.sigma.max()) if role == "sigma" else 1.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)
    dense = truth.delta()
    torch.testing.assert_close(
        found.delta(), dense, rtol=0, atol=tolerance * float(dense.abs().max())
    )


def by_numpy(dense, rank):
    """(u, sigma, v) of a dense matrix; the largest entry of each column of u positive."""
    u, sigma, vh = np.linalg.svd(dense.double().numpy(), full_matrices=False)
    sign = np.sign(u[np.abs(u).argmax(0), np.arange(u.shape[1])])
    return (u * sign)[:, :rank], sigma[:rank], (vh.T * sign)[:, :rank]


def change_of_basis(rank, seed, condition=30.0):
    """A matrix of GL(r) with singular values between 1 and `condition`, in double."""
    g = torch.Generator().manual_seed(seed)
    (left, _), (right, _) = (
        torch.linalg.qr(torch.randn(rank, rank, generator=g, dtype=torch.float64)) for _ in "ab"
    )
    return left * torch.logspace(0, np.log10(condition), rank, dtype=torch.float64) @ right


@given(
    out=st.integers(1, 40), inner=st.integers(1, 40), rank=st.integers(1, 12),
    scale=st.floats(1e-4, 1e3), seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True)
def test_is_the_svd_of_the_dense_change(out, inner, rank, scale, seed):
    down, up = (f.double() for f in factors(out, inner, rank, seed))
    found, dense = canonical_factors(down, up, scale), scale * up @ down
    k = min(out, inner, rank)
    assert (found.u.shape, found.sigma.shape, found.v.shape) == ((out, k), (k,), (inner, k))
    u, sigma, v = by_numpy(dense, k)
    top = sigma[0]
    assert found.sigma.numpy() == pytest.approx(sigma, rel=1e-5, abs=1e-5 * top)
    assert (found.sigma.diff() <= 0).all()
    torch.testing.assert_close(found.delta(), dense.float(), rtol=0, atol=1e-5 * top)
    # A vector is as well determined as its singular value is far from the others.
    gaps = np.abs(sigma[:, None] - sigma) + top * np.eye(k)
    for i in np.flatnonzero(np.minimum(gaps.min(1), sigma) > 1e-3 * top):
        assert found.u[:, i].numpy() == pytest.approx(u[:, i], abs=1e-5)
        assert found.v[:, i].numpy() == pytest.approx(v[:, i], abs=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 4, 16, 40])
def test_another_factoring_is_the_same(rank):
    down, up = (f.double() for f in factors(64, 48, rank, rank))
    truth = canonical_factors(down, up, 0.5)
    for seed in range(5):
        m = change_of_basis(rank, seed)
        same(canonical_factors(torch.linalg.inv(m) @ down, up @ m, 0.5), truth)
    # In single precision the factors themselves are rounded.
    m = change_of_basis(rank, 9, condition=3.0)
    turned = canonical_factors((torch.linalg.inv(m) @ down).float(), (up @ m).float(), 0.5)
    torch.testing.assert_close(turned.sigma, truth.sigma, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        turned.delta(), truth.delta(), rtol=0, atol=1e-5 * truth.sigma[0].item()
    )


@pytest.mark.parametrize("rank", [1, 3])
def test_entries_of_one_size(rank):
    """After one step of Lion all of B is +lr or -lr: which entry is the largest must not hang on rounding."""
    down, up = (f.double() for f in factors(64, 48, rank, 3))
    up = (
        up[:, :1].sign()
        if rank == 1
        else torch.eye(64).double()[:, :rank] - torch.eye(64).double()[:, 9 : 9 + rank]
    )
    truth = canonical_factors(down, up)
    for seed in range(20):
        m = change_of_basis(rank, seed)
        same(canonical_factors(torch.linalg.inv(m) @ down, up @ m), truth)


@pytest.mark.parametrize("rank", [1, 256])
def test_thin_and_wider_than_the_layer(rank):
    """Also the published thing: scale split between the factors, merged, and the top r of an SVD."""
    down, up = (f.double() for f in factors(64, 48, rank, 3))
    truth, k = canonical_factors(down, up), min(rank, 48)
    u, sigma, v = by_numpy(up @ down, k)
    assert len(truth.sigma) == k
    assert truth.sigma.numpy() == pytest.approx(sigma, rel=1e-5)
    assert np.abs(truth.u.numpy() - u).max() <= 1e-5 and np.abs(truth.v.numpy() - v).max() <= 1e-5
    m = change_of_basis(rank, 1)
    same(canonical_factors(torch.linalg.inv(m) @ down, up @ m), truth)
    same(canonical_matrix(up @ down).top(k), truth)


@pytest.mark.parametrize("alpha, rank", [(1.0, 4), (4.0, 4), (32.0, 4), (0.37, 4)])
def test_alpha_is_a_scale_like_any_other(alpha, rank):
    down, up = factors(8, 24, rank, 0)
    truth = canonical_factors(down, up, alpha / rank)
    same(canonical_module(LoraModule.of(NAME, down, up, alpha)), truth)
    split = (alpha / rank) ** 0.5
    same(canonical_module(LoraModule.of(NAME, down * split, up * split)), truth)
    # The same factors, padded to twice the rank with alpha doubled.
    wide = torch.cat([down, torch.zeros_like(down)]), torch.cat([up, torch.randn_like(up)], 1)
    same(canonical_module(LoraModule.of(NAME, *wide, 2 * alpha)).top(rank), truth)
    sigma = canonical_module(LoraModule.of(NAME, *wide, 2 * alpha)).sigma
    assert float(sigma[rank:].max()) <= 1e-6 * float(sigma[0])


@pytest.mark.parametrize("layout", ["diffusers", "peft", "kohya"])
def test_every_layout_gives_the_same(tmp_path, weights, layout):
    path = tmp_path / ("out" if layout == "peft" else "out.safetensors")
    write_lora(weights, path, layout)
    found = open_lora(path).load().modules
    assert found.keys() == TARGETS.keys()
    for name, module in weights.modules.items():
        same(canonical_module(found[name]), canonical_module(module))


def test_merged_and_taken_apart_again(weights):
    for name, module in weights.modules.items():
        if max(module.weight_shape) > 100:
            continue
        base = torch.randn(module.weight_shape, generator=torch.Generator().manual_seed(1)).double()
        merged = base + module.delta().double()
        same(
            canonical_matrix((merged - base).flatten(1)).top(module.rank), canonical_module(module)
        )
        assert canonical_module(module).u.shape[0] == TARGETS[name][0]


def test_convolutions_are_flattened_as_torch_flattens_them():
    down, up = factors(8, 6, 2, 0, kernel=3)
    module = LoraModule.of("unet.down_blocks.0.resnets.0.conv1", down, up, 1.0)
    found = canonical_module(module)
    assert (found.u.shape, found.v.shape) == ((8, 2), (6 * 9, 2))
    x = torch.randn(1, 6, 5, 5, generator=torch.Generator().manual_seed(2))
    run = torch.nn.functional.conv2d
    as_trained = run(run(x, down, padding=1), up) * 0.5
    torch.testing.assert_close(
        run(x, found.delta().view(8, 6, 3, 3), padding=1), as_trained, rtol=1e-4, atol=1e-4
    )
    mid = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(3))
    tensors = {"down": down[..., :1, :1].contiguous(), "up": up, "mid": mid}
    tucker = replace(module, tensors=tensors)
    as_trained = run(run(run(x, tensors["down"]), mid, padding=1), up) * 0.5
    ours = canonical_module(tucker).delta().view(8, 6, 3, 3)
    torch.testing.assert_close(run(x, ours, padding=1), as_trained, rtol=1e-4, atol=1e-4)


def test_no_change_is_no_number_that_is_not_one():
    down, up = factors(8, 24, 4, 0)
    for a, b in ((down, 0 * up), (0 * down, up), (0 * down, 0 * up)):
        found = canonical_factors(a, b, 0.5)
        assert all(t.isfinite().all() for t in (found.u, found.sigma, found.v))
        assert not found.sigma.any() and not found.delta().any()
    found = canonical_matrix(torch.zeros(8, 24))
    assert all(t.isfinite().all() for t in (found.u, found.sigma, found.v))
    assert not found.sigma.any()


def test_a_batch_is_one_by_one():
    parts = [factors(8, 24, 4, seed) for seed in range(3)]
    scales = torch.tensor([0.5, 1.0, 3.0])
    stacked = canonical_factors(
        torch.stack([d for d, _ in parts]), torch.stack([u for _, u in parts]), scales
    )
    for i, (down, up) in enumerate(parts):
        one = canonical_factors(down, up, float(scales[i]))
        same(type(one)(stacked.u[i], stacked.sigma[i], stacked.v[i]), one)


def test_the_strongest_and_no_more():
    down, up = factors(8, 24, 4, 0)
    whole = canonical_factors(down, up)
    for count in (2, 4, 7):
        found = canonical_module(LoraModule.of(NAME, down, up), most=count)
        assert (found.u.shape, found.sigma.shape, found.v.shape) == (
            (8, count),
            (count,),
            (24, count),
        )
        u, sigma, v = by_numpy(up @ down, count)
        best = torch.from_numpy((u * sigma) @ v.T).float()
        torch.testing.assert_close(found.delta(), best, rtol=0, atol=1e-5 * sigma[0])
        assert not found.sigma[4:].any() and not found.u[:, 4:].any() and not found.v[:, 4:].any()
    assert whole.top(4).delta().equal(whole.delta())


def draw(**shapes):
    g = torch.Generator().manual_seed(4)
    return {role: torch.randn(shape, generator=g) for role, shape in shapes.items()}


HADA = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 24), "hada_w2_a": (8, 2), "hada_w2_b": (2, 24)}
OTHERS = {
    "loha": (HADA, lambda t: (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])),
    "lokr": (
        {"lokr_w1": (2, 4), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 6)},
        lambda t: torch.kron(t["lokr_w1"], t["lokr_w2_a"] @ t["lokr_w2_b"]),
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_products_are_materialised(kind):
    shapes, formula = OTHERS[kind]
    tensors = draw(**shapes)
    module = LoraModule(NAME, kind, tensors, alpha=1.0, rank=2)
    dense, found = formula(tensors) * 0.5, canonical_module(module)
    u, sigma, _ = by_numpy(dense, 8)
    assert found.sigma.numpy() == pytest.approx(sigma, abs=1e-5 * sigma[0])
    torch.testing.assert_close(found.delta(), dense, rtol=0, atol=1e-5 * sigma[0])
    torch.testing.assert_close(found.delta(), module.delta(), rtol=0, atol=1e-5 * sigma[0])
    strong = sigma > 1e-3 * sigma[0]
    assert np.abs(found.u.numpy() - u)[:, strong].max() <= 1e-4


def test_dora_is_materialised_over_its_base():
    down, up = factors(8, 24, 2, 0)
    base, magnitude = (
        torch.randn(*s, generator=torch.Generator().manual_seed(5)) for s in ((8, 24), (8,))
    )
    magnitude = magnitude.abs() + 0.5
    module = LoraModule(NAME, "dora", {"down": down, "up": up, "magnitude": magnitude}, 1.0, 2)
    moved = base + 0.5 * up @ down
    dense = torch.stack([m * row / row.norm() for m, row in zip(magnitude, moved)]) - base
    found = canonical_module(module, base)
    torch.testing.assert_close(found.delta(), dense, rtol=0, atol=1e-5 * found.sigma[0].item())
    torch.testing.assert_close(
        found.delta(), module.delta(base), rtol=0, atol=1e-5 * found.sigma[0].item()
    )
    with pytest.raises(InputError, match="DoRA depends on the base weight"):
        canonical_module(module)


def test_what_the_trainer_leaves_is_read_as_it_acts(denoiser):
    """The canonical change, put on the base by hand, is what `attach` makes of the LoRA."""
    adapter = denoiser.inject(3, 2.0, ["to_q", "conv1"], text_encoder=False, init=False)
    weights = adapter.weights()
    denoiser.detach()
    before = {
        name: denoiser.unet.get_submodule(name.removeprefix("unet.")).weight.clone()
        for name in weights.modules
    }
    denoiser.attach(LoraWeights(weights.modules))
    for name, base in before.items():
        now = denoiser.unet.get_submodule(name.removeprefix("unet.")).weight
        ours = base + canonical_module(weights.modules[name]).delta().view(base.shape)
        torch.testing.assert_close(ours, now, rtol=0, atol=1e-5)
