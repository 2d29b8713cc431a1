"""What goes on a base: a LoRA, merged into swapped weights (any layout) or through PEFT; a whole other model."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from diffward.errors import InputError

if TYPE_CHECKING:
    from diffward.lora import LoraWeights

# What `targets="text"`, `"attention"` and so on mean, as suffixes of module names.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
CONVOLUTION = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
TEXT_SIDE = ("attn2.to_k", "attn2.to_v")
TARGETS = {
    "text": TEXT_SIDE,
    "attention": ATTENTION,
    "attention+ff": ATTENTION + FEED_FORWARD,
    "all": ATTENTION + FEED_FORWARD + CONVOLUTION,
}
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


class Adapter(Protocol):
    """Something that changes the base and can be switched."""

    enabled: bool
    touched: set[str]

    def enable(self, on: bool) -> None: ...
    def remove(self) -> None: ...


class MergedAdapter:
    """A LoRA whose change is computed once; on and off swap two weight tensors.

    Exact for every layout (LoRA, LoHa, LoKr, DoRA) and as fast as the base. Costs one more copy of
    the adapted weights.
    """

    def __init__(self, components: Mapping[str, nn.Module], weights: LoraWeights) -> None:
        self.enabled = False
        self.touched: set[str] = set()
        self._pairs: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        for name, module in weights.modules.items():
            prefix, path = name.split(".", 1)
            parameter = components[prefix].get_submodule(path).weight
            assert isinstance(parameter, nn.Parameter)
            base = parameter.data
            delta = module.delta(base.detach().cpu())
            merged = (base.float() + delta.to(base.device).view(base.shape)).to(base.dtype)
            if not torch.isfinite(merged).all():
                raise InputError(
                    f"{weights.source}: module {name} gives weights that are not finite"
                )
            self._pairs.append((parameter, base, merged))
            self.touched.add(prefix)
        self.enable(True)

    def enable(self, on: bool) -> None:
        for parameter, base, merged in self._pairs:
            parameter.data = merged if on else base
        self.enabled = on

    def remove(self) -> None:
        self.enable(False)
        self._pairs.clear()


class SwappedWeights:
    """Another model's weights in the place of the base's; on and off swap tensors.

    Keeps what differs only, so it costs one more copy of that. A tensor that is the base's rounded to half
    precision counts as the base's: nothing was learned in it.

    Attributes:
        given: components of which there are tensors.
        touched: those of which something differs.
    """

    def __init__(
        self, components: Mapping[str, nn.Module], weights: Mapping[str, Tensor], where: str
    ) -> None:
        """See `Denoiser.attach_model`."""
        self.enabled = False
        self._pairs: dict[str, tuple[nn.Parameter, Tensor, Tensor]] = {}
        own = {
            f"{prefix}.{name}": parameter
            for prefix, component in components.items()
            for name, parameter in component.named_parameters()
        }
        names = set(weights)
        self.given = {name.split(".")[0] for name in names}
        self._check_names(own, names, where)
        for name in (name for name in own if name in names):
            parameter, base, tensor = own[name], own[name].data, weights[name]
            if tensor.shape != base.shape:
                raise InputError(
                    f"{where}: {name} is {_by(tensor)}, the base's {_by(base)}; it is of another architecture"
                )
            if not torch.isfinite(tensor.float()).all():
                raise InputError(f"{where}: {name} holds NaN or infinity")
            tensor = tensor.to(base.device, base.dtype)
            if not any(torch.equal(tensor, rounded) for rounded in _roundings(base)):
                self._pairs[name] = (parameter, base, tensor)
        if not self._pairs:
            raise InputError(
                f"{where}: each of its tensors is the base's, so nothing was fine-tuned; give as --base what the "
                "model was trained from"
            )
        self.touched = {name.split(".")[0] for name in self._pairs}
        self.enable(True)

    def _check_names(self, own: Mapping[str, nn.Parameter], names: set[str], where: str) -> None:
        if lacking := [n for n in own if n.split(".")[0] in self.given and n not in names]:
            raise InputError(
                f"{where}: has no tensor {lacking[0]}, the base has; it is of another architecture"
            )
        if more := sorted(names - set(own)):
            raise InputError(
                f"{where}: {len(more)} tensors are not in the base ({more[0]} …); it is of another architecture"
            )

    @property
    def changed(self) -> list[str]:
        """Names of the tensors that differ."""
        return list(self._pairs)

    @property
    def parameters(self) -> int:
        """How many numbers those hold."""
        return sum(base.numel() for _, base, _ in self._pairs.values())

    def changes(self) -> Iterator[tuple[str, Tensor]]:
        """Name and change (the model's less the base's, float32) of each tensor that differs."""
        for name, (_, base, other) in self._pairs.items():
            yield name, other.float() - base.float()

    def enable(self, on: bool) -> None:
        for parameter, base, other in self._pairs.values():
            parameter.data = other if on else base
        self.enabled = on

    def remove(self) -> None:
        self.enable(False)
        self._pairs.clear()


def _roundings(base: Tensor) -> Iterator[Tensor]:
    yield base
    for kind in (torch.float16, torch.bfloat16):
        yield base.to(kind).to(base.dtype)


def _by(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"


class PeftAdapter:
    """A trainable LoRA on the UNet, and on the text encoder if asked, named "default".

    The order matters (model on its device, LoRA injected, then hooks and optimizer): see PEFT's
    troubleshooting page and opacus #820.
    """

    def __init__(
        self,
        components: Mapping[str, nn.Module],
        rank: int,
        alpha: float,
        targets: Sequence[str],
        init: Any,
        exclude: Sequence[str] = (),
    ) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        self.enabled = True
        self.rank, self.alpha = rank, alpha
        self.touched = set(components)
        self._components = dict(components)
        self._found: dict[str, Any] = {}
        for prefix, component in self._components.items():
            wanted = list(targets) if prefix == "unet" else list(TEXT_TARGETS)
            left_out = list(exclude) if prefix == "unet" and exclude else None
            config = LoraConfig(
                r=rank, lora_alpha=alpha, target_modules=wanted, init_lora_weights=init,
                exclude_modules=left_out,
            )  # fmt: skip
            try:
                inject_adapter_in_model(config, component, adapter_name="default")
            except ValueError as error:
                raise InputError(
                    f"no module of the base's {prefix} matches the targets {wanted}"
                    + (" and may be trained" if left_out else "")
                ) from error
        for parameter in self.parameters():
            parameter.data = parameter.data.float()

    def layers(self) -> dict[str, Any]:
        """PEFT's LoRA layers by canonical name (`unet.….to_q`); those that only an added LoRA has are left out."""
        return {name: m for name, m in self._every_layer().items() if "default" in m.lora_A}

    def _every_layer(self) -> dict[str, Any]:
        from peft.tuners.lora import LoraLayer

        if not self._found:  # a walk over all modules, and `use` comes several times a step
            self._found = {
                f"{prefix}.{name}": module
                for prefix, component in self._components.items()
                for name, module in component.named_modules()
                if isinstance(module, LoraLayer)
            }
        return self._found

    def parameters(self) -> list[nn.Parameter]:
        """The trainable factors, A and B of each layer in turn."""
        return [
            factor["default"].weight
            for layer in self.layers().values()
            for factor in (layer.lora_A, layer.lora_B)
        ]

    def weights(self) -> LoraWeights:
        """The factors as they stand, on the CPU."""
        from diffward.lora import LoraModule, LoraWeights

        modules = {
            name: LoraModule.of(
                name,
                layer.lora_A["default"].weight.detach().cpu().clone(),
                layer.lora_B["default"].weight.detach().cpu().clone(),
                self.alpha,
            )
            for name, layer in self.layers().items()
        }
        return LoraWeights(modules)

    @torch.no_grad()
    def load(self, weights: LoraWeights) -> None:
        """Set the factors; names and shapes must be those of `weights()`."""
        for name, layer in self.layers().items():
            layer.lora_A["default"].weight.copy_(weights.modules[name].tensors["down"])
            layer.lora_B["default"].weight.copy_(weights.modules[name].tensors["up"])

    def add(self, name: str, weights: LoraWeights) -> None:
        """Put another LoRA beside this one, frozen and resting until `using` asks for it; its modules are its own."""
        from peft import LoraConfig, inject_adapter_in_model

        modules = weights.modules
        first = next(iter(modules.values()))
        for prefix, component in self._components.items():
            targets = [n.split(".", 1)[1] for n in modules if n.startswith(f"{prefix}.")]
            config = LoraConfig(
                r=first.rank, lora_alpha=first.effective_alpha, target_modules=targets
            )  # type: ignore[arg-type]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT wonders at a second adapter: it is meant
                inject_adapter_in_model(config, component, adapter_name=name)
        self._found = {}
        every = self._every_layer()
        for path, module in modules.items():
            layer = every[path]
            for factor, role in ((layer.lora_A[name], "down"), (layer.lora_B[name], "up")):
                factor.weight.data.copy_(module.tensors[role])
                factor.weight.requires_grad_(False)
        self.use("default")

    def use(self, name: str) -> None:
        """Let the LoRA `name` act, in place of the one that did."""
        for layer in self._every_layer().values():
            # PEFT's own switch would also freeze and unfreeze the factors. A layer without that LoRA is the base's.
            layer._active_adapter = [name]
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Within the block another LoRA acts."""
        self.use(name)
        try:
            yield
        finally:
            self.use("default")

    def enable(self, on: bool) -> None:
        for layer in self._every_layer().values():
            layer.enable_adapters(on)
        # PEFT freezes what it disables; whether a factor trains is not the switch's business.
        for parameter in self.parameters():
            parameter.requires_grad_(True)
        self.enabled = on

    def remove(self) -> None:
        for name, layer in self._every_layer().items():
            prefix, path = name.split(".", 1)
            parent_path, _, leaf = path.rpartition(".")
            parent = self._components[prefix].get_submodule(parent_path)
            setattr(parent, leaf, layer.base_layer)
        self._found = {}
        for component in self._components.values():
            if hasattr(component, "peft_config"):
                del component.peft_config
