"""One adapted module and the change it makes to its weight.

The formulas are those of the tools that write the files: kohya's LoRA and LoCon, LyCORIS's LoHa and
LoKr, PEFT's and LyCORIS's DoRA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffward.errors import InputError
from diffward.lora.shapes import kind_of, weight_shape

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LoraModule:
    """One adapted module.

    `name` is canonical (`unet.down_blocks.0.….to_q`), or positional (`unet:0`) until resolved.
    `tensors` by role: `down` (r, in[, kh, kw]) and `up` (out, r[, 1, 1]), `mid`; `hada_*`; `lokr_*`;
    `magnitude` (PEFT's DoRA) or `dora_scale` (LyCORIS's). `alpha` is None where the file gives
    none. `shape` is the weight's, once resolved against a base. `scale_override` is set where the
    factor is not alpha / rank (rank-stabilised LoRA, LoKr of two full factors).
    """

    name: str
    kind: str
    tensors: dict[str, Tensor] = field(repr=False)
    alpha: float | None
    rank: int
    shape: tuple[int, ...] | None = None
    scale_override: float | None = None

    @classmethod
    def of(cls, name: str, down: Tensor, up: Tensor, alpha: float | None = None) -> LoraModule:
        """A plain LoRA or LoCon module from its two factors."""
        tensors = {"down": down, "up": up}
        shape = weight_shape({role: tuple(tensor.shape) for role, tensor in tensors.items()})
        return cls(name, kind_of(tensors, shape), tensors, alpha, int(down.shape[0]))

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied with."""
        if self.scale_override is not None:
            return self.scale_override
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def effective_alpha(self) -> float:
        """The alpha with which alpha / rank gives `scale`."""
        if self.scale_override is not None:
            return self.scale_override * self.rank
        return float(self.rank) if self.alpha is None else self.alpha

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The weight's shape: as resolved, else as the factors tell it."""
        if self.shape is not None:
            return self.shape
        return weight_shape({role: tuple(tensor.shape) for role, tensor in self.tensors.items()})

    def delta(self, base_weight: Tensor | None = None) -> Tensor:
        """The change of the weight, float32 at least, scale included.

        Shape: (out, in) or (out, in, kh, kw), that of `base_weight` or of the resolved base where
        known. DoRA needs `base_weight` and raises `InputError` without it.
        """
        import torch

        tensors = {
            role: tensor if tensor.dtype == torch.float64 else tensor.float()
            for role, tensor in self.tensors.items()
        }
        delta = self._product(tensors) * self.scale
        shape = tuple(base_weight.shape) if base_weight is not None else self.weight_shape
        if delta.numel() != math.prod(shape):
            raise InputError(
                f"module {self.name}: the adapter gives {tuple(delta.shape)}, the weight is {shape}"
            )
        delta = delta.reshape(shape)
        if "magnitude" not in tensors and "dora_scale" not in tensors:
            return delta
        if base_weight is None:
            raise InputError(f"module {self.name}: DoRA depends on the base weight; give a base")
        base = base_weight.to(delta.dtype)
        return _decompose(base + delta, tensors) - base

    def _product(self, t: dict[str, Tensor]) -> Tensor:
        import torch

        if "down" in t:
            up, down = t["up"].flatten(1), t["down"]
            if "mid" in t:
                return torch.einsum("ijkl,pi,jr->prkl", t["mid"], up, down.flatten(1))
            return (up @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
        if "hada_w1_a" in t:
            return _hada(t, 1) * _hada(t, 2)
        first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
        if "lokr_w2" in t:
            second = t["lokr_w2"]
        elif "lokr_t2" in t:
            second = _tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
        else:
            second = t["lokr_w2_a"] @ t["lokr_w2_b"]
        if second.ndim == 4:
            first = first[:, :, None, None]
        return torch.kron(first, second.contiguous())


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(r, r, kh, kw), (r, out), (r, in) → (out, in, kh, kw)."""
    import torch

    return torch.einsum("ijkl,ip,jr->prkl", core, a, b)


def _hada(t: dict[str, Tensor], i: int) -> Tensor:
    a, b = t[f"hada_w{i}_a"], t[f"hada_w{i}_b"]
    core = t.get(f"hada_t{i}")
    return a @ b if core is None else _tucker(core, a, b)


def _decompose(weight: Tensor, t: dict[str, Tensor]) -> Tensor:
    """DoRA (arXiv 2402.09353): the direction of `weight` with the learned magnitude.

    PEFT's magnitude and LyCORIS's with `wd_on_output` have one number an output; LyCORIS's older
    default has one an input, and its shape (1, in, …) says so.
    """
    out = weight.shape[0]
    ones = [1] * (weight.ndim - 2)
    magnitude = t["magnitude"] if "magnitude" in t else t["dora_scale"]
    if "magnitude" in t or magnitude.shape[0] == out:
        norm = weight.flatten(1).norm(dim=1).reshape(out, 1, *ones)
        return weight * (magnitude.reshape(out, 1, *ones) / norm)
    norm = weight.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *ones)
    return weight * (magnitude.reshape(1, -1, *ones) / norm)
