"""Keeping to a mask in trainers that are not ours: full fine-tuning, PEFT, kohya's scripts.

A mask is advisory: whoever holds the weights can train all of them. `verify` tells afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffward.errors import InputError, TrainingError
from diffward.guard.candidate import open_model, split_adapter
from diffward.guard.publish import write_guarded as write_guarded
from diffward.models.adapters import TARGETS
from diffward.models.parameters import hashes, parameters_of, tensor_hash

if TYPE_CHECKING:
    from diffward.guard.mask import FreezeMask


# --- full fine-tuning ------------------------------------------------------------------------------


def freeze(unet: nn.Module, mask: FreezeMask) -> list[nn.Parameter]:
    """Take the frozen tensors out of training; gives what still trains, for the optimizer.

    Call it before the optimizer is made. What did not require a gradient before does not now. A UNet that
    accelerate has prepared, or that is compiled, is fine.

    Raises:
        InputError: another model's mask, a LoRA sits on a frozen tensor, or nothing is left to train.
    """
    unet = _bare(unet)
    own = _own(unet, mask)
    for name, _ in unet.named_parameters():
        module = name.split(".lora_")[0]
        if module != name and mask.tensors[f"{module}.weight"].frozen:
            raise InputError(
                f"{module}: carries a LoRA but is frozen; choose its targets with lora_targets"
            )
    for name in mask.frozen:
        own[name].requires_grad_(False)
    left = [p for p in unet.parameters() if p.requires_grad]
    if not left:
        raise InputError(
            "nothing is left to train: no other parameter of the UNet requires a gradient"
        )
    return left


class Keeper:
    """Watches the frozen tensors of a UNet in training; remembers their hashes.

    As a context it checks at the end. With an optimizer, each of its steps is stopped before it is made if a
    frozen tensor is in it or has got a gradient.

    Raises:
        InputError: another model's mask.
        TrainingError: a frozen tensor gets a gradient, is in the optimizer, or has moved.
    """

    def __init__(
        self, unet: nn.Module, mask: FreezeMask, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        own = _own(_bare(unet), mask)
        self._frozen = {name: own[name] for name in mask.frozen}
        self._before = hashes(self._frozen, self._frozen)
        self._optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        if self._optimizer is not None:
            self._check_gradients()
            self._optimizer.register_step_pre_hook(lambda *_: self._check_gradients())

    def check(self) -> None:
        """Look at gradients and values: as long as hashing the frozen tensors takes."""
        self._check_gradients()
        moved = [n for n, p in self._frozen.items() if tensor_hash(p) != self._before[n]]
        if moved:
            raise TrainingError(f"{moved[0]} is frozen and has moved ({len(moved)} such)")

    def _check_gradients(self) -> None:
        for name, parameter in self._frozen.items():
            if parameter.grad is not None or parameter.requires_grad:
                raise TrainingError(
                    f"{name} is frozen and gets a gradient; call freeze before training"
                )
        if self._optimizer is not None:
            trained = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
            for name, parameter in self._frozen.items():
                if id(parameter) in trained:
                    raise TrainingError(
                        f"{name} is frozen and in the optimizer; give it what freeze returns"
                    )

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.check()


def watch(
    unet: nn.Module, mask: FreezeMask, optimizer: torch.optim.Optimizer | None = None
) -> Keeper:
    """A `Keeper`: `with watch(unet, mask, optimizer): …`."""
    return Keeper(unet, mask, optimizer)


@torch.no_grad()
def restore(
    unet: nn.Module, base: str | Path | Mapping[str, Tensor], mask: FreezeMask
) -> list[str]:
    """Put the base's values back into the frozen tensors, bit for bit; gives the names of those that had moved.

    Args:
        unet: as `UNet2DConditionModel.from_pretrained` gives it.
        base: what `verify` takes as a base, read a tensor at a time, or weights by name.

    Raises:
        InputError: another model, or values that are not those of the mask's base; then nothing is changed.
    """
    own = _own(_bare(unet), mask)
    weights: Mapping[str, Tensor]
    if isinstance(base, Mapping):
        weights, where = base, "the weights"
    else:
        model = open_model(base, mask)
        if not model.copies:
            raise InputError(f"{base}: is an adapter; give the model that the mask was made for")
        weights, where = model.unet, str(base)
    for name in mask.frozen:
        value = weights.get(name)
        if value is None or value.shape != own[name].shape or not mask.is_base(name, value):
            raise InputError(f"{where}: {name} is not that of the base that the mask was made for")
    moved = []
    for name in mask.frozen:
        before = tensor_hash(own[name])
        own[name].copy_(weights[name])
        if tensor_hash(own[name]) != before:
            moved.append(name)
    return moved


# --- adapters --------------------------------------------------------------------------------------


def lora_targets(unet: nn.Module, mask: FreezeMask, targets: str | Sequence[str]) -> list[str]:
    """Full names of the modules that a LoRA may go on: `LoraConfig(target_modules=…)`.

    Args:
        targets: ends of module names, as PEFT takes them, or text, attention, attention+ff, all.

    Raises:
        InputError: another model's mask, no such module, or each of them is frozen.
    """
    unet = _bare(unet)
    _own(unet, mask)
    ends = TARGETS.get(targets, (targets,)) if isinstance(targets, str) else tuple(targets)
    wanted = [
        n for n in _modules(unet) if n.endswith(tuple(f".{end}" for end in ends)) or n in ends
    ]
    if not wanted:
        raise InputError(f"no linear layer or convolution of the UNet is called {', '.join(ends)}")
    if left := [name for name in wanted if not mask.tensors[f"{name}.weight"].frozen]:
        return left
    raise InputError(f"the mask freezes each of the {len(wanted)} modules called {', '.join(ends)}")


def kohya_excluded(unet: nn.Module, mask: FreezeMask) -> list[str]:
    """kohya's names of the modules that a LoRA must not go on: `lora_unet_down_blocks_0_…`."""
    unet = _bare(unet)
    _own(unet, mask)
    return [f"lora_unet_{name.replace('.', '_')}" for name in mask.modules(_modules(unet))]


def kohya_pattern(unet: nn.Module, mask: FreezeMask) -> str:
    """A regular expression for `exclude_patterns` of kohya's trainers: matches just the frozen modules.

    With dots, as those trainers compare it, and as `kohya_excluded` writes the names; the whole name.
    """
    unet = _bare(unet)
    _own(unet, mask)
    names = [re.escape(n).replace(r"\.", "[._]") for n in mask.modules(_modules(unet))]
    return rf"^(?:lora_unet_)?(?:{'|'.join(names)})$"


def strip_lora(path: str | Path, mask: FreezeMask, out: str | Path) -> list[str]:
    """Copy a LoRA without its modules on frozen tensors; gives their names.

    The layout is kept where we write it (diffusers, PEFT folders, kohya); others become kohya's. Tensors that stay
    keep their bits, the header passes the whitelist of `scrub`.

    Raises:
        InputError: not a LoRA, for another model, or none of its modules would be left.
    """
    from diffward.lora import LoraWeights, open_lora, write_lora

    out = Path(out)
    file = open_lora(path)
    if out.exists() and out.samefile(path):
        raise InputError(f"{out}: would overwrite the file it is made from; give another --out")
    weights = file.load(dtype=None)
    unet, rest = split_adapter(weights, mask)
    frozen = {f"unet.{name}".removesuffix(".weight") for name in mask.frozen}
    kept = {name: module for name, module in unet.modules.items() if name not in frozen}
    if not kept and not rest.modules:
        raise InputError(
            f"{path}: each of its {len(unet.modules)} modules is on a frozen tensor; nothing is left"
        )
    form: Any = "diffusers" if file.format.startswith("diffusers") else "kohya"
    if file.configs:
        form = "peft"
    left = LoraWeights(
        kept | rest.modules, weights.extras, weights.metadata, weights.base_family, str(path)
    )
    write_lora(left, out, form, weights.metadata)
    return [name.removeprefix("unet.") for name in unet.modules if name in frozen]


# --- help ------------------------------------------------------------------------------------------


def _bare(unet: nn.Module) -> nn.Module:
    """The UNet inside what accelerate or torch.compile made of it."""
    for wrapper in ("_orig_mod", "module", "_orig_mod"):
        inner = getattr(unet, wrapper, None)
        unet = inner if isinstance(inner, nn.Module) else unet
    return unet


def _own(unet: nn.Module, mask: FreezeMask) -> dict[str, nn.Parameter]:
    own = parameters_of(unet)
    mask.check_names({name: tuple(p.shape) for name, p in own.items()}, "the UNet")
    return own


def _modules(unet: nn.Module) -> list[str]:
    """Names of the linear layers and convolutions, adapters left out."""
    return [
        name.removesuffix(".base_layer")
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and ".lora_" not in name
    ]
