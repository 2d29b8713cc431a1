"""Two factors a module, along which a white-box probe takes gradients: the file's own, or fresh ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffward.lora import LoraModule, LoraWeights

UP_SCALE = 0.02  # standard deviation of fresh `up` factors: neither factor's gradient is zero
MAX_RANK = 64  # of factors that are computed: a LoKr of two full factors has no small rank
CHANGE_RANK = 16  # of those of a full model's change


def own_factors(weights: LoraWeights) -> LoraWeights:
    """The UNet's modules as B A with `down` (r, in[, kh, kw]) and `up` (out, r), times their scale.

    LoRA and LoCon stay what they are; a LoCon's `mid` goes into `down`. LoHa and LoKr get the best
    factors of the file's rank (64 at most), from a singular value decomposition of their change.
    DoRA gives its low-rank part: gradients along its magnitude are left out, and those along the
    factors do not see its normalisation. Modules of the text encoders are left out.

    Args:
        weights: resolved against a base.
    """
    modules = {
        name: _two_factors(module)
        for name, module in weights.modules.items()
        if name.startswith("unet.")
    }
    return replace(weights, modules=modules, extras={})


def change_factors(
    changes: Iterable[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, ...]]
) -> LoraWeights:
    """What full fine-tuning did to the UNet, as if a LoRA of rank 16 had: the directions in which it moved most.

    For white-box probes only, which take gradients along factors: of each matrix's change those that are nearest
    to it, from a singular value decomposition. What does not fit them is left out, as are biases and norms; the
    model itself is never approximated. Where the change is a LoRA's the factors span what its own do.

    Args:
        changes: parameter name with component prefix (`unet.….weight`) and its change.
        shapes: weight shape of the base's linear layers and convolutions, by module (`Denoiser.module_shapes`).
    """
    modules = {}
    for parameter, delta in changes:
        name = parameter.removesuffix(".weight")
        if name == parameter or name not in shapes or not name.startswith("unet."):
            continue
        down, up = _best_factors(delta.cpu(), CHANGE_RANK)
        modules[name] = replace(LoraModule.of(name, down, up), shape=tuple(shapes[name]))
    return LoraWeights(modules)


def random_factors(weights: LoraWeights, seed: int) -> LoraWeights:
    """Fresh factors with the names, shapes and scales of `own_factors(…)`, and nothing else of them.

    `down` is Kaiming-uniform as PEFT starts it; `up` is normal and small, not zero as in training,
    where the gradient along `down` would vanish. Gradients of the base along trained factors would
    tell of the pictures that these were trained on: a base control must not see them.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name in sorted(weights.modules):
        module = weights.modules[name]
        down, up = module.tensors["down"].shape, module.tensors["up"].shape
        bound = 1 / math.sqrt(math.prod(down[1:]))  # Kaiming-uniform with a = sqrt(5)
        fresh = {
            "down": (torch.rand(down, generator=generator) * 2 - 1) * bound,
            "up": torch.randn(up, generator=generator) * UP_SCALE,
        }
        modules[name] = replace(module, tensors=fresh)
    return replace(weights, modules=modules)


def along_factors(
    layer: nn.Module, factors: Mapping[str, Tensor], x: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:
    """dL/dA (m, r, in[, kh, kw]) and dL/dB (m, out, r) of a linear layer or convolution, scale 1.

    Args:
        factors: `down` A and `up` B.
        x, g: the layer's input, and the loss's gradient at its output; (m, …, in), (m, …, out) or
            (m, in, H, W), (m, out, H', W').
    """
    down = factors["down"].to(x).flatten(1)
    up = factors["up"].to(x).flatten(1)
    if not isinstance(layer, nn.Conv2d):
        x, g = (v.reshape(len(v), -1, v.shape[-1]) for v in (x, g))
        return (g @ up).mT @ x, g.mT @ (x @ down.mT)
    weight = down.reshape(len(down), *layer.weight.shape[1:])
    low = F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation)
    up_slope = torch.einsum("mohw,mrhw->mor", g, low)
    back = torch.einsum("mohw,or->mrhw", g, up)
    # As `unfold` would, but a place of the kernel at a time: it takes kh * kw times less memory.
    assert not isinstance(layer.padding, str)
    (sy, sx), (dy, dx), (py, px) = layer.stride, layer.dilation, layer.padding
    padded = F.pad(x, (px, px, py, py))
    height, width = g.shape[-2:]
    places = []
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            rows = slice(i * dy, i * dy + (height - 1) * sy + 1, sy)
            columns = slice(j * dx, j * dx + (width - 1) * sx + 1, sx)
            places.append(torch.einsum("mrhw,mchw->mrc", back, padded[:, :, rows, columns]))
    return torch.stack(places, dim=-1).unflatten(-1, weight.shape[2:]), up_slope


def _two_factors(module: LoraModule) -> LoraModule:
    tensors = {r: t for r, t in module.tensors.items() if r not in ("magnitude", "dora_scale")}
    if "down" not in tensors:
        down, up = _best_factors(
            replace(module, tensors=tensors).delta(), min(module.rank, MAX_RANK)
        )
        # The change has its scale in it.
        factors = LoraModule.of(module.name, down, up, alpha=None)
        return replace(factors, shape=module.shape)
    if "mid" in tensors:
        core, down = tensors["mid"].float(), tensors["down"].flatten(1).float()
        tensors = {"down": torch.einsum("ijkl,jr->irkl", core, down), "up": tensors["up"]}
    elif len(tensors) == len(module.tensors):
        return module
    return replace(LoraModule.of(module.name, **tensors, alpha=module.alpha), shape=module.shape,
                   scale_override=module.scale_override)  # fmt: skip


def _best_factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`down` (r, in, …) and `up` (out, r) whose product is nearest to `delta` (out, in, …).

    With U S Vᵀ the decomposition, up = U √S and down = √S Vᵀ, from the smaller Gram matrix.
    """
    matrix = delta.flatten(1).double()
    wide = matrix.shape[0] <= matrix.shape[1]
    gram = matrix @ matrix.T if wide else matrix.T @ matrix
    values, vectors = torch.linalg.eigh(gram)
    kept = slice(-min(rank, len(values)), None)
    root = values[kept].clamp(min=0).sqrt().sqrt()[:, None]  # √S
    there = root > 1e-3 * root.max()  # what is smaller is rounding
    near = (torch.where(there, root, 0.0) * vectors[:, kept].T).T
    # The other side: √S Vᵀ = Uᵀ W / √S.
    far = vectors[:, kept].T @ (matrix if wide else matrix.T)
    far = torch.where(there, far / torch.where(there, root, 1.0), 0.0)
    up, down = (near, far) if wide else (far.T, near.T)
    down = down.reshape(down.shape[0], *delta.shape[1:])
    return down.float().contiguous(), up.float().contiguous()
