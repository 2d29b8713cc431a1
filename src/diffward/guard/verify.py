"""Did a published model keep to the mask? Every frozen tensor that moved, and how; nothing is loaded whole."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffward.errors import InputError
from diffward.guard.candidate import Model, Weights, open_model, split_adapter
from diffward.guard.lowrank import low_rank
from diffward.models.parameters import tensor_hash

if TYPE_CHECKING:
    from diffward.guard.mask import FreezeMask
    from diffward.lora import LoraModule

_SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Moved:
    """A frozen tensor that is not the base's.

    Attributes:
        kind: "changed"; "low rank", as a merged LoRA leaves it; "ema", in the moving average that lies beside the
            model; "adapter", by a LoRA in a file of its own.
        max_abs: largest absolute difference from the base, rounded as the candidate is; NaN if it holds NaN.
        rank: of the difference, where that is low, or of the adapter.
        copy: which of several copies of the UNet ("fp16", "ema"), "" the one that loaders take.
    """

    name: str
    kind: str
    max_abs: float
    rank: int | None = None
    copy: str = ""

    def told(self) -> str:
        size = f"by up to {self.max_abs:.3g}" if math.isfinite(self.max_abs) else "no longer finite"
        rank = (
            f" ({self.rank})"
            if self.kind == "low rank"
            else f", rank {self.rank}"
            if self.rank
            else ""
        )
        place = f" (in the copy {self.copy})" if self.copy and self.kind != "ema" else ""
        return f"{self.name}: {self.kind}{rank}, {size}{place}"


@dataclass
class Verdict:
    """What `verify` found.

    Attributes:
        frozen: tensors that the mask freezes.
        whole: the candidate is a model, not an adapter alone.
        cast: how the candidate's frozen tensors are rounded ("fp16"), None if they are not.
        checked: tensors of the candidate, or modules of the adapter, that were looked at.
        notes: what the mask does not cover and other things to know.
    """

    base: str
    candidate: str
    frozen: int
    whole: bool
    moved: list[Moved] = field(default_factory=list)
    cast: str | None = None
    checked: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.moved

    def told(self) -> list[str]:
        """Lines for a person: the finding, one line a tensor, the notes."""
        names = {moved.name for moved in self.moved}
        if self.ok and not self.whole:
            what = f"none of its {self.checked} modules changes one of {self.frozen} frozen tensors"
            lines = [f"{self.candidate}: kept to the mask: {what}"]
        elif self.ok:
            cast = f", rounded to {self.cast}" if self.cast else ""
            lines = [
                f"{self.candidate}: kept to the mask: {self.frozen} frozen tensors are the base's{cast}"
            ]
        else:
            lines = [f"{self.candidate}: {len(names)} of {self.frozen} frozen tensors moved"]
        return (
            lines
            + [f"  {moved.told()}" for moved in self.moved]
            + [f"note: {n}" for n in self.notes]
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON; a difference that is not finite is None."""
        data = {"ok": self.ok, **asdict(self)}
        for row in data["moved"]:
            row["max_abs"] = row["max_abs"] if math.isfinite(row["max_abs"]) else None
        return data


def verify(base: str | Path, candidate: str | Path, mask: FreezeMask) -> Verdict:
    """Compare the candidate's frozen tensors with the base's, one after the other.

    Args:
        base: the mask's base, or it rounded to half precision: what `open_model` opens, or "mini".
        candidate: a model, or a LoRA of any layout.

    A tensor is intact if it has the base's values or those rounded to half precision, once or (a model loaded in
    fp16 and saved in bf16) twice. Copies that lie beside the model, EMA and variants, are looked at too.

    Raises:
        InputError: the base is not the mask's, the candidate is another model or lacks a tensor, or a file is
            damaged.
    """
    given, other = open_model(base, mask), open_model(candidate, mask)
    if not given.copies:
        raise InputError(
            f"{base}: is an adapter; give the model that the mask was made for as the base"
        )
    verdict = Verdict(str(base), str(candidate), len(mask.frozen), bool(other.copies))
    adapters = _modules(other, mask, verdict)
    casts: Counter[str] = Counter()
    for name, entry in mask.tensors.items():
        own = given.unet[name]
        if not mask.is_base(name, own):
            raise InputError(
                f"{base}: {name} has other values than the base that the mask was made for"
            )
        if not entry.frozen:
            continue
        for copy, weights in other.copies.items():
            if name not in weights:
                continue
            verdict.checked += 1
            tensor = weights[name]
            cast = _cast(tensor, own, entry.hashes)
            if cast is None and copy in given.copies and copy:
                # The base's own moving average is not its weights.
                cast = (
                    _cast(tensor, given.copies[copy][name], {})
                    if name in given.copies[copy]
                    else None
                )
            if cast is None:
                verdict.moved.append(_moved(name, own, tensor, entry.hashes, copy))
            elif copy == "":
                casts[cast] += 1
        verdict.moved += _adapted(name, own, adapters.get(name, ()), verdict)
    del casts[""]
    verdict.cast = ", ".join(casts) or None
    _say(given, other, verdict)
    return verdict


# --- whole models ----------------------------------------------------------------------------------


def _cast(tensor: Tensor, base: Tensor, hashes: Mapping[str, str]) -> str | None:
    """How the base is rounded in `tensor`: "" not at all, "fp16", "fp16 to bf16"; None if it is not the base."""
    found = tensor_hash(tensor)
    for name in ("fp32", "fp16", "bf16"):
        if hashes.get(name) == found:
            return "" if name == "fp32" else name
    kinds = dict.fromkeys((tensor.dtype, *_HALF))
    chains = [(), *((kind,) for kind in kinds), *permutations(kinds, 2)]
    for chain in chains:
        # A part first: of tensors that moved it is enough.
        if all(_is_rounded(tensor, base, chain, count) for count in (4096, None)):
            return " to ".join(_name(kind) for kind in chain if kind != torch.float32)
    return None


def _is_rounded(
    tensor: Tensor, base: Tensor, chain: Sequence[torch.dtype], count: int | None
) -> bool:
    rounded = base.flatten()[:count]
    for dtype in chain:
        rounded = rounded.to(dtype)
    return torch.equal(rounded.float(), tensor.flatten()[:count].float())


def _moved(name: str, base: Tensor, tensor: Tensor, hashes: Mapping[str, str], copy: str) -> Moved:
    difference = float((tensor.float() - base.to(tensor.dtype).float()).abs().max())
    exact = hashes.get("fp32") == tensor_hash(base)
    rank = low_rank(base, tensor, exact) if math.isfinite(difference) else None
    kind = "ema" if copy.startswith("ema") else "low rank" if rank else "changed"
    return Moved(name, kind, difference, rank, copy)


def _name(dtype: torch.dtype) -> str:
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))


# --- adapters --------------------------------------------------------------------------------------


def _modules(other: Model, mask: FreezeMask, verdict: Verdict) -> dict[str, list[LoraModule]]:
    """The adapters' modules by the parameter they are on; notes what is outside the UNet."""
    found: dict[str, list[LoraModule]] = {}
    for file in other.adapters:
        if file.kind == "textual_inversion":
            verdict.notes.append(
                "holds trained words (textual inversion): a bypass that the mask does not cover"
            )
            continue
        unet, rest = split_adapter(file.load(), mask)
        for name, module in unet.modules.items():
            found.setdefault(f"{name.removeprefix('unet.')}.weight", []).append(module)
        if rest.modules:
            verdict.notes.append(
                f"the adapter changes the text encoder too ({len(rest.modules)} modules): a bypass that the mask "
                "does not cover"
            )
        if rest.extras:
            verdict.notes.append(
                "the adapter holds trained words too: a bypass that the mask does not cover"
            )
    verdict.checked += sum(map(len, found.values()))
    return found


def _adapted(
    name: str, base: Tensor, modules: Sequence[LoraModule], verdict: Verdict
) -> list[Moved]:
    sizes = [float(module.delta(base.float()).abs().max()) for module in modules]
    if 0 in sizes:
        verdict.notes.append(
            f"{name}: the adapter has a module on it, but one that changes nothing"
        )
    return [
        Moved(name, "adapter", size, m.rank) for size, m in zip(sizes, modules, strict=True) if size
    ]


# --- notes -----------------------------------------------------------------------------------------


def _say(given: Model, other: Model, verdict: Verdict) -> None:
    if beside := [copy for copy in other.copies if copy]:
        verdict.notes.append(
            f"looked at copies of the UNet that lie beside it too: {', '.join(beside)}"
        )
    if given.text and other.text and (note := _text(given.text, other.text)):
        verdict.notes.append(note)


def _text(given: Weights, other: Weights) -> str | None:
    common = [name for name in given if name in other]
    if not common:
        return "the text encoders have other names in the two files and were not compared"
    for name in common:
        if given.shape(name) != other.shape(name):
            break
        source, key = given.places[name]
        if not source.dtypes[key].startswith(("F", "BF")):
            continue  # positions and the like
        if _cast(other[name], given[name], {}) is None:
            break
    else:
        return None
    return (
        f"the text encoder is not the base's (first {name}): a bypass that the mask does not cover"
    )
