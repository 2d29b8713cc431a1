"""K LoRAs at once on one frozen base: each has its own share of the batch.

A batch of n·B rows holds B rows of each adapter, adapter by adapter. The base's layers run once over
all rows; what each adapter adds comes from batched products of stacked factors. Ranks below the
widest are padded with zeros, which stay zero: the gradient of a padded row of A is a product with
the zero row of B, and the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffward.errors import InputError

if TYPE_CHECKING:
    from diffward.lora import LoraWeights
    from diffward.models.denoiser import Denoiser

# oneDNN's product of float32 matrices: the one behind F.linear reaches half its speed on some CPUs.
_ONEDNN: Callable[..., Tensor] | None = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()
    else None
)


def stack(denoiser: Denoiser, weights: Sequence[LoraWeights]) -> StackedAdapter:
    """Put K plain LoRAs on the base's UNet at once, trainable, in place of what was on it.

    Raises:
        InputError: they adapt different modules, or are no plain LoRAs of this UNet.
    """
    denoiser.detach()
    denoiser._adapter = adapter = StackedAdapter(denoiser.unet, weights)
    return adapter


class StackedAdapter:
    """K LoRAs with stacked factors; an `Adapter` that trains.

    The forward passes of the UNet's linear layers and adapted convolutions are shadowed; its modules
    and weights stay untouched.

    Attributes:
        count: K, the LoRAs in the stack.
        active: the first so many take part, with a batch of active·B rows; the others rest.
        labels: what each LoRA is called by whoever made the stack.
    """

    def __init__(self, unet: nn.Module, weights: Sequence[LoraWeights]) -> None:
        if not weights:
            raise InputError("there is no LoRA to stack")
        self.enabled = True
        self.touched = {"unet"}
        self.count = self.active = len(weights)
        self.labels = list(range(len(weights)))
        rank = max(module.rank for w in weights for module in w.modules.values())
        self.layers = {
            name: StackedLayer(self, _target(unet, name), rank) for name in weights[0].modules
        }
        for k, one in enumerate(weights):
            self.load(k, one)
        self._shadowed: list[nn.Module] = []
        for layer in self.layers.values():
            self._shadow(layer.module, layer)
        for module in unet.modules():
            if type(module) is nn.Linear and "forward" not in vars(module):
                self._shadow(module, _Lean(self, module))

    def parameters(self) -> list[nn.Parameter]:
        """The stacked factors, A (K, r, in·kh·kw) and B transposed (K, r, out) of each layer in turn."""
        return [factor for layer in self.layers.values() for factor in (layer.down, layer.up)]

    def weights(self, k: int) -> LoraWeights:
        """The factors of LoRA number k as they stand, of its own rank, on the CPU."""
        from diffward.lora import LoraModule, LoraWeights

        modules = {
            name: LoraModule.of(name, *layer.factors(k), layer.alphas[k])
            for name, layer in self.layers.items()
        }
        return LoraWeights(modules)

    def load(self, k: int, weights: LoraWeights) -> None:
        """Set the factors and alpha of LoRA number k; its rank must fit into the stack."""
        if weights.modules.keys() != self.layers.keys():
            other = sorted(weights.modules.keys() ^ self.layers.keys())[0]
            raise InputError(
                f"LoRAs in one stack must adapt the same modules; not all have {other}"
            )
        for name, layer in self.layers.items():
            module = weights.modules[name]
            if module.tensors.keys() != {"down", "up"}:
                raise InputError(f"module {name}: only plain LoRAs can be stacked")
            down, up = module.tensors["down"], module.tensors["up"]
            layer.set(k, down, up, module.effective_alpha)

    def enable(self, on: bool) -> None:
        self.enabled = on

    def remove(self) -> None:
        for module in self._shadowed:
            del vars(module)["forward"]
        self._shadowed.clear()

    def _shadow(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        vars(module)["forward"] = forward  # found before the class's own
        self._shadowed.append(module)


class StackedLayer:
    """The stacked factors of one linear layer or convolution, and its forward pass with them."""

    def __init__(self, adapter: StackedAdapter, module: nn.Linear | nn.Conv2d, rank: int) -> None:
        self.adapter, self.module, self.base = adapter, module, module.forward
        out, *inputs = module.weight.shape
        self.kernel = tuple(inputs)  # (in,) or (in, kh, kw)
        dtype = torch.promote_types(module.weight.dtype, torch.float32)
        options: dict[str, Any] = {"device": module.weight.device, "dtype": dtype}
        size = torch.Size(inputs).numel()
        self.down = nn.Parameter(torch.zeros(adapter.count, rank, size, **options))
        self.up = nn.Parameter(torch.zeros(adapter.count, rank, out, **options))
        self.ranks, self.alphas = [0] * adapter.count, [0.0] * adapter.count
        self.scale = torch.zeros(adapter.count, 1, 1, **options)
        self.pointwise = isinstance(module, nn.Conv2d) and (
            module.kernel_size == module.stride == (1, 1) and module.padding == (0, 0)
        )

    @torch.no_grad()
    def set(self, k: int, down: Tensor, up: Tensor, alpha: float) -> None:
        rank = len(down)
        if rank > self.down.shape[1] or down.shape[1:] != self.kernel:
            raise InputError(
                f"factor {tuple(down.shape)} does not fit a stack of rank {self.down.shape[1]} "
                f"over inputs {self.kernel}"
            )
        self.ranks[k], self.alphas[k], self.scale[k] = rank, alpha, alpha / rank
        for stacked, factor in ((self.down, down.flatten(1)), (self.up, up.flatten(1).t())):
            stacked[k].zero_()
            stacked[k, :rank] = factor

    def factors(self, k: int) -> tuple[Tensor, Tensor]:
        """A (r, in[, kh, kw]) and B (out, r[, 1, 1]) of LoRA number k, copied to the CPU."""
        down = self.down.detach()[k, : self.ranks[k]].cpu().clone()
        up = self.up.detach()[k, : self.ranks[k]].t().cpu().clone(memory_format=torch.contiguous_format)  # fmt: skip
        ones = [1] * (len(self.kernel) - 1)
        return down.view(-1, *self.kernel), up.view(*up.shape, *ones)

    def __call__(self, x: Tensor) -> Tensor:
        if not self.adapter.enabled:
            return self.base(x)
        active = self.adapter.active
        if len(x) % active:
            raise ValueError(f"{len(x)} rows cannot be shared by {active} LoRAs")
        # Slices cost a copy of the gradient: only where some rest.
        whole = active == self.adapter.count
        down, up = (self.down, self.up) if whole else (self.down[:active], self.up[:active])
        scaled = up * self.scale[:active]
        if isinstance(self.module, nn.Linear):
            dtype = _compute_dtype(x)
            x, down, scaled = x.to(dtype), down.to(dtype), scaled.to(dtype)
            return _Linear.apply(x, self.module.weight, self.module.bias, down, scaled)
        return self._convolve(self.module, x, down, scaled)

    def _convolve(self, module: nn.Conv2d, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """x (K·B, in, h, w) → (K·B, out, h', w'); down (K, r, in·kh·kw), up (K, r, out)."""
        base = F.conv2d(
            x, module.weight, module.bias, module.stride, module.padding, module.dilation
        )
        count, rank = down.shape[:2]
        per = len(x) // count
        if self.pointwise:
            hidden = down[:, None] @ x.reshape(count, per, x.shape[1], -1)
        else:
            # One convolution with a group for each LoRA: their channels side by side.
            side = x.view(count, per, *x.shape[1:]).transpose(0, 1).flatten(1, 2)
            filters = down.view(count * rank, *self.kernel)
            hidden = F.conv2d(
                side, filters, None, module.stride, module.padding, module.dilation, count
            )
            hidden = hidden.view(per, count, rank, -1).transpose(0, 1)  # (K, B, r, h'·w')
        change = up.transpose(1, 2)[:, None] @ hidden
        return base + change.view(base.shape)


class _Lean:
    """The forward pass of a linear layer without factors."""

    def __init__(self, adapter: StackedAdapter, module: nn.Linear) -> None:
        self.adapter, self.module, self.base = adapter, module, module.forward

    def __call__(self, x: Tensor) -> Tensor:
        if not self.adapter.enabled or _ONEDNN is None or not _is_plain(x):
            return self.base(x)
        return _Linear.apply(x, self.module.weight, self.module.bias, None, None)


class _Linear(torch.autograd.Function):
    """x W^T + b, plus (x_k A_k^T) B_k^T for each share of the rows; W and b are frozen.

    One node instead of a dozen: what the factors add goes into the base's own output and input
    gradient, in place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor | None,
                up: Tensor | None) -> Tensor:  # fmt: skip
        """x (K·B, …, in), weight (out, in), down (K, r, in), scaled up (K, r, out)."""
        rows = x.reshape(-1, x.shape[-1])
        y = _matmul(rows, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        if down is None or up is None:
            ctx.save_for_backward(weight)
        else:
            shares = rows.view(len(down), -1, x.shape[-1])
            hidden = torch.bmm(down, shares.transpose(1, 2))  # (K, r, N): the quicker way round
            y.view(len(down), -1, y.shape[-1]).baddbmm_(hidden.transpose(1, 2), up)
            ctx.save_for_backward(weight, shares, hidden, down, up)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = ddown = dup = None
        if ctx.needs_input_grad[0]:
            dx = _matmul(rows, weight.t().to(dy.dtype), None)
        if kept:
            x, hidden, down, up = kept
            shares = rows.view(len(down), -1, dy.shape[-1])
            dhidden = torch.bmm(up, shares.transpose(1, 2))  # (K, r, N)
            ddown, dup = torch.bmm(dhidden, x), torch.bmm(hidden, shares)
            if dx is not None:
                dx.view(x.shape).baddbmm_(dhidden.transpose(1, 2), down)
        if dx is not None:
            dx = dx.view(*dy.shape[:-1], dx.shape[-1])
        return dx, None, None, ddown, dup


def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (N, in) and weight (out, in) → (N, out)."""
    if _ONEDNN is not None and _is_plain(x):
        return _ONEDNN(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _is_plain(x: Tensor) -> bool:
    return x.device.type == "cpu" and _compute_dtype(x) == torch.float32


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _target(unet: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    try:
        module = unet.get_submodule(name.removeprefix("unet."))
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear | nn.Conv2d):
        raise InputError(f"the base has no linear layer or convolution {name}")
    if isinstance(module, nn.Conv2d) and (module.groups > 1 or module.padding_mode != "zeros"):
        raise InputError(f"module {name}: LoRAs on such a convolution cannot be stacked")
    return module
