"""What a network sees of a LoRA, against P^T W Q / |W| of dense matrices; the same however it was factored."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffward.errors import InputError
from diffward.inversion.tokens import SPECTRUM, Basis, Tokens
from diffward.lora import LoraModule, LoraWeights, open_lora, write_lora

SIDE = 6


@pytest.fixture(scope="module")
def basis(straight):
    return Basis.fit(straight, straight.rows, SIDE)


@pytest.fixture(scope="module")
def lora(straight):
    return straight.lora(straight.rows[-1])  # of rank above 1, or the tests say less


def alike(found, truth, tolerance=1e-5):
    for name, tensor in vars(truth).items():
        if tensor.dtype == torch.bool:
            assert torch.equal(getattr(found, name), tensor), name
        else:
            torch.testing.assert_close(
                getattr(found, name).float(), tensor.float(), rtol=tolerance, atol=tolerance
            )


def dense(module):
    """(out, in kh kw), in double, from the factors."""
    down, up = module.tensors["down"].double().flatten(1), module.tensors["up"].double().flatten(1)
    return up @ down * (module.alpha / module.rank)


def changed(weights, change):
    return LoraWeights({name: change(module) for name, module in weights.modules.items()})


def turned(module, seed=0):
    """The factors (B M, M^-1 A), in double."""
    m = torch.randn(
        module.rank, module.rank, generator=torch.Generator().manual_seed(seed)
    ).double()
    m += 2 * torch.eye(module.rank)
    down, up = module.tensors["down"].double(), module.tensors["up"].double()
    tensors = {
        "down": (torch.linalg.inv(m) @ down.flatten(1)).view(down.shape),
        "up": (up.flatten(1) @ m).view(up.shape),
    }
    return replace(module, tensors=tensors)


def rescaled(module):
    tensors = {role: tensor * 4 for role, tensor in module.tensors.items()}
    return replace(module, tensors=tensors, alpha=module.alpha / 16)


def widened(module):
    """A rank more that does nothing."""
    down, up = module.tensors["down"], module.tensors["up"]
    tensors = {
        "down": torch.cat([down, torch.randn_like(down[:1])]),
        "up": torch.cat([up, torch.zeros_like(up[:, :1])], 1),
    }
    alpha = module.alpha * (module.rank + 1) / module.rank
    return LoraModule.of(module.name, tensors["down"], tensors["up"], alpha)


def test_the_numbers_are_those_of_dense_matrices(straight, basis):
    for row in (straight.rows[0], straight.rows[-1]):
        weights = straight.lora(row)
        found = basis.of_lora(weights)
        assert found.cores.shape == (1, len(basis.modules), SIDE, SIDE) and len(found) == 1
        for i, name in enumerate(basis.modules):
            w = dense(weights.modules[name])
            core = basis.left[name].double().T @ (w / w.norm()) @ basis.right[name].double()
            torch.testing.assert_close(found.cores[0, i].double(), core, rtol=0, atol=1e-5)
            assert float(found.norms[0, i]) == pytest.approx(float(w.norm().log()), abs=1e-5)
            sigma = np.linalg.svd(w.numpy(), compute_uv=False)[:SPECTRUM] / float(w.norm())
            assert found.spectra[0, i, : len(sigma)].numpy() == pytest.approx(sigma, abs=1e-5)
            assert bool(found.present[0, i])


@pytest.mark.parametrize("change", [turned, rescaled, widened])
def test_another_factoring_is_the_same(basis, lora, change):
    assert {m.rank for m in lora.modules.values()} != {1}
    alike(basis.of_lora(changed(lora, change)), basis.of_lora(lora))


def test_another_change_is_not(basis, lora):
    truth = basis.of_lora(lora)
    swapped = changed(
        lora, lambda m: replace(m, tensors=m.tensors | {"up": m.tensors["up"].flip(0)})
    )
    assert (basis.of_lora(swapped).cores - truth.cores).abs().max() > 0.05
    doubled = basis.of_lora(changed(lora, lambda m: replace(m, alpha=2 * m.alpha)))
    torch.testing.assert_close(doubled.norms, truth.norms + np.log(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(doubled.cores, truth.cores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["diffusers", "peft", "kohya"])
def test_every_layout_gives_the_same(basis, straight, lora, denoiser, tmp_path, layout):
    path = tmp_path / ("out" if layout == "peft" else "out.safetensors")
    write_lora(lora, path, layout)
    read = open_lora(path).load().resolve(denoiser.module_shapes())
    alike(basis.of_lora(read), basis.of_lora(lora))
    alike(basis.of_zoo(straight, straight.rows[-1:]), basis.of_lora(read).half(), 1e-3)


def test_the_bases_are_where_the_changes_lie(straight):
    """The leading eigenvectors of the mean of W W^T / |W|^2, of numpy's; each row counts alike."""
    rows = straight.rows[1:]
    basis = Basis.fit(straight, rows, SIDE)
    assert basis.modules == list(straight.head.modules)
    for name in basis.modules:
        changes = [dense(straight.lora(row).modules[name]) for row in rows]
        changes = [w / w.norm() for w in changes]
        for vectors, moment in (
            (basis.left[name], sum(w @ w.T for w in changes)),
            (basis.right[name], sum(w.T @ w for w in changes)),
        ):
            gram = (vectors.T @ vectors).double()
            torch.testing.assert_close(gram, torch.eye(SIDE).double(), rtol=0, atol=1e-5)
            kept = float(torch.trace(vectors.T.double() @ moment @ vectors.double()))
            best = np.linalg.eigvalsh(moment.numpy())[::-1]
            assert kept == pytest.approx(float(best[:SIDE].sum()), rel=1e-5)
            first = float(vectors[:, 0].double() @ moment @ vectors[:, 0].double())
            assert first == pytest.approx(float(best[0]), rel=1e-5)  # the strongest comes first


def test_modules_narrower_than_the_bases(straight):
    """The tiny base has layers of 8; of 24 directions the other 16 do not exist. Nothing is lost."""
    basis = Basis.fit(straight, straight.rows)
    row = straight.rows[-1]
    found = basis.of_lora(straight.lora(row))
    narrow = [i for i, n in enumerate(basis.modules) if max(*dense(straight.lora(row).modules[n]).shape) <= 24]  # fmt: skip
    assert narrow
    for i in narrow:  # all of W is in the core
        assert float(found.cores[0, i].norm()) == pytest.approx(1, abs=1e-4)


def test_what_is_not_there_is_zero(basis, lora):
    first, second, *_ = basis.modules
    modules = dict(lora.modules)
    del modules[first]
    still = modules[second]
    modules[second] = replace(still, tensors=still.tensors | {"up": 0 * still.tensors["up"]})
    found, whole = basis.of_lora(LoraWeights(modules)), basis.of_lora(lora)
    assert found.present[0].tolist() == [False, False] + [True] * (len(basis.modules) - 2)
    for tensor in (found.cores, found.norms, found.spectra):
        assert tensor.isfinite().all() and not tensor[0, :2].any()
    alike(*(Tokens(t.cores[:, 2:], t.norms[:, 2:], t.spectra[:, 2:], t.present[:, 2:]) for t in (found, whole)))  # fmt: skip


def test_a_module_more_makes_no_difference(basis, lora):
    other = LoraModule.of("unet.somewhere.to_q", torch.randn(2, 8), torch.randn(8, 2), 2.0)
    more = LoraWeights({other.name: other, **lora.modules})
    alike(basis.of_lora(more), basis.of_lora(lora))


def test_a_zoo_keeps_the_order_of_rows(straight, basis):
    rows = [straight.rows[i] for i in np.random.default_rng(0).permutation(len(straight))]
    assert len({row.shard for row in rows}) == 2
    assert [row.shard for row in rows] != sorted(row.shard for row in rows)
    found = basis.of_zoo(straight, rows)
    assert found.cores.dtype == torch.float16 and len(found) == len(rows)
    for i, row in enumerate(rows):
        alike(found.of([i]), basis.of_lora(straight.lora(row)), 1e-3)  # half precision
        torch.testing.assert_close(
            found.norms[i], basis.of_lora(straight.lora(row)).norms[0], rtol=1e-5, atol=1e-5
        )
    again = Tokens.cat([basis.of_zoo(straight, rows[:2]), basis.of_zoo(straight, rows[2:])])
    alike(again, found, 1e-3)
    assert torch.equal(found.of([2, 0]).norms, found.norms[[2, 0]])


def test_saves_of_one_shard_alone(straight, basis):
    rows = [row for row in straight.rows if row.shard == 1][::-1]
    found = basis.of_zoo(straight, rows)
    for i, row in enumerate(rows):
        alike(found.of([i]), basis.of_lora(straight.lora(row)), 1e-3)


def test_what_does_not_fit(basis, lora):
    with pytest.raises(InputError, match="adapts none of the modules"):
        basis.of_lora(LoraWeights({}))
    elsewhere = LoraModule.of("text_encoder.layers.0.q_proj", torch.randn(2, 8), torch.randn(8, 2))
    with pytest.raises(InputError, match="adapts none of the modules"):
        basis.of_lora(LoraWeights({elsewhere.name: elsewhere}))
    name, module = next(iter(lora.modules.items()))
    out, inner = dense(module).shape
    for shape in ((out + 8, inner), (out, inner + 8)):
        wide = LoraModule.of(name, torch.randn(2, shape[1]), torch.randn(shape[0], 2), 2.0)
        with pytest.raises(InputError, match=f"^module {name}: its shape is not that of the base"):
            basis.of_lora(LoraWeights({**lora.modules, name: wide}))
