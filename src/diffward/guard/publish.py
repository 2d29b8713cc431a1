"""Publishing a guarded base: the model, its mask and a card that says what the mask is worth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from diffward.errors import InputError
from diffward.files import atomic_folder, write_text
from diffward.guard.mask import FreezeMask
from diffward.models.parameters import parameters_of, put

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser

MASK = "mask.json"


def write_guarded(
    denoiser: Denoiser, mask: FreezeMask, edit: Mapping[str, Tensor] | None, out: str | Path
) -> FreezeMask:
    """Write the base as a diffusers folder, with its mask (`mask.json`) and a card (`README.md`) in it.

    A diffusers folder that is at `out` is replaced, and only once all is written. The denoiser is left as it was.
    With an edit (`uce`, `imma`) the mask's hashes become those of the edited base.

    Args:
        edit: new values of some of the UNet's parameters.

    Returns:
        The mask as written.

    Raises:
        InputError: the mask is of another base, the edit does not fit it, or `out` holds something else.
    """
    out, own = Path(out), parameters_of(denoiser.unet)
    if any(".lora_" in name for name, _ in denoiser.unet.named_parameters()):
        raise InputError("the UNet carries a LoRA; take it off (detach) before the base is written")
    if out.is_file() or (
        out.is_dir() and any(out.iterdir()) and not (out / "model_index.json").is_file()
    ):
        raise InputError(f"{out}: is there already and is no diffusers folder; give another --out")
    edit = dict(edit or {})
    if unknown := [n for n, t in edit.items() if n not in own or t.shape != own[n].shape]:
        raise InputError(
            f"the edit's {unknown[0]} is not a tensor of base {denoiser.name}, or has another shape"
        )
    # Of the base as it is, or as it will be: a mask may have been learned on the edited one.
    mask.check_names({n: tuple(p.shape) for n, p in own.items()}, f"base {denoiser.name}")
    if not all(mask.is_base(n, own[n]) or (n in edit and mask.is_base(n, edit[n])) for n in own):
        raise InputError(
            f"base {denoiser.name}: has other values than the base that the mask was made for"
        )
    before = {name: own[name].detach().clone() for name in edit}
    try:
        put(denoiser.unet, edit)
        if edit:
            facts = {**mask.facts, "edited_tensors": len(edit)}
            weights = {name: own[name] for name in mask.tensors}
            frozen = [entry.frozen for entry in mask.tensors.values()]
            scores = [entry.score for entry in mask.tensors.values()]
            mask = FreezeMask.of(weights, frozen, scores, facts)
        with atomic_folder(out) as temporary:
            denoiser.save_pipeline(temporary)
            mask.save(temporary / MASK)
            write_text(temporary / "README.md", card(mask, out.name))
    finally:
        put(denoiser.unet, before)
    return mask


def card(mask: FreezeMask, name: str) -> str:
    """A model card's words (Markdown) on what is frozen, what that is worth, and how to check it."""
    blocks = Counter(".".join(n.split(".")[: 2 if "_blocks." in n else 1]) for n in mask.tensors)
    frozen = Counter(".".join(n.split(".")[: 2 if "_blocks." in n else 1]) for n in mask.frozen)
    rows = [
        f"| `{block}` | {frozen[block]} of {count} |"
        for block, count in blocks.items()
        if frozen[block]
    ]
    method = mask.facts.get("method")
    how = f" Found by `{method}`." if isinstance(method, str) else ""
    edited = mask.facts.get("edited_tensors")
    changed = (
        f" {edited} tensors were edited before the mask's hashes were taken." if edited else ""
    )
    return "\n".join([
        f"# {name}: fine-tune it under its mask", "",
        f"`{MASK}` names the tensors of the UNet that are to stay as they are when this model is fine-tuned: "
        f"{mask.told()}.{how}{changed}", "",
        "| part of the UNet | frozen tensors |", "|---|---|", *rows, "",
        "**The mask is advisory.** It is learned so that fine-tuning works in the domains its publisher allows and "
        "works badly in those that it forbids. Whoever holds the weights can train the frozen tensors all the same; "
        "a check finds that afterwards and cannot prevent it. The text encoder is not covered.", "",
        "To keep to it: `diffward guard train`, or, in a trainer of your own,", "",
        "```python", "from diffward.guard import FreezeMask", "from diffward.guard.apply import freeze", "",
        f'trainable = freeze(unet, FreezeMask.load("{MASK}"))  # for the optimizer', "```", "",
        "To check a model or a LoRA that was made from this one:", "",
        "```", f"diffward guard verify {name} CANDIDATE {name}/{MASK}", "```", "",
    ])  # fmt: skip
