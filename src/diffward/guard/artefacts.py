"""The files that a guard leaves, masks and edited weights, opened for a base and put into one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor

from diffward.errors import InputError
from diffward.guard.mask import FreezeMask
from diffward.guard.publish import MASK, write_guarded
from diffward.guard.stored import Stored
from diffward.models.parameters import parameters_of, put

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser

EDIT = "edit.safetensors"


def read_mask(path: str | Path, denoiser: Denoiser | None = None) -> FreezeMask:
    """A mask, ours or the public code's positional text file; told apart by what is in it.

    Args:
        path: the file, or a guarded folder that holds one.
        denoiser: the base, without which positions have no names.

    Raises:
        InputError: no such file, damaged, freezes nothing or everything; or positions without a base.
    """
    file = Path(path) / MASK if Path(path).is_dir() else Path(path)
    if not file.exists():
        raise InputError(f"{file}: no such mask; `diffward guard learn` makes one")
    with file.open("rb") as handle:
        first = handle.read(64).lstrip()[:1]
    if first in (b"{", b"[", b""):
        mask = FreezeMask.load(file)
    elif denoiser is not None:
        mask = FreezeMask.of_positions(file, denoiser)
    else:
        raise InputError(
            f"{file}: holds positions without names; convert it: diffward guard apply BASE --mask {file.name} "
            "--out mask.json"
        )
    if len(mask.frozen) in (0, len(mask.tensors)):
        what = "every tensor: nothing is left to train" if mask.frozen else "nothing"
        raise InputError(f"{file}: a mask that freezes {what}")
    return mask


def open_mask(path: str | Path, denoiser: Denoiser) -> FreezeMask:
    """A mask that is for this base, tensor by tensor and value by value.

    Raises:
        InputError: as `read_mask`, or it is for another base.
    """
    mask = read_mask(path, denoiser)
    mask.check_base(parameters_of(denoiser.unet), f"base {denoiser.name}")
    return mask


def read_edit(path: str | Path, denoiser: Denoiser) -> dict[str, Tensor]:
    """Edited weights (`edit.safetensors` of uce or imma) for this base.

    Raises:
        InputError: unreadable, for another model, or not finite.
    """
    try:
        edit = dict(Stored(Path(path)))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as edited weights ({str(error)[:80]})") from error
    if not edit:
        raise InputError(f"{path}: holds no tensor")
    own = parameters_of(denoiser.unet)
    for name, tensor in edit.items():
        if name not in own or own[name].shape != tensor.shape:
            raise InputError(
                f"base {denoiser.name}: has no tensor {name} of that shape; {path} is for another model"
            )
        if not torch.isfinite(tensor).all():
            raise InputError(f"{path}: {name} is not finite")
    return edit


def put_edit(denoiser: Denoiser, edit: Mapping[str, Tensor]) -> list[str]:
    """Make the edited base the base; gives the names of the tensors."""
    put(denoiser.unet, edit)
    vars(denoiser).pop("unet_identity", None)  # it was of the base before
    return list(edit)


def write_base(
    denoiser: Denoiser, mask: str | None, edit: str | None, out: Path
) -> FreezeMask | None:
    """`guard apply`: a diffusers folder of the base, edited and with its mask in it; or a mask alone.

    Args:
        mask, edit: their files; one of them at least.
        out: a folder; a `.json` file where only the mask is to be written in our format.

    Raises:
        InputError: neither is given, they do not fit the base, or `out` holds something else.
    """
    if not mask and not edit:
        raise InputError("--mask or --edit is missing: say what guards the base")
    if out.suffix == ".json":
        if edit or not mask:
            raise InputError(f"--out {out}: a .json file takes the mask alone; name a folder")
        given = open_mask(mask, denoiser)
        given.save(out)
        return given
    changed = read_edit(edit, denoiser) if edit else {}
    if mask:
        # Checked there: it may be of the base as it is or as it will be.
        return write_guarded(denoiser, read_mask(mask, denoiser), changed, out)
    if out.is_file() or (
        out.is_dir() and any(out.iterdir()) and not (out / "model_index.json").is_file()
    ):
        raise InputError(f"{out}: is there already and is no diffusers folder; give another --out")
    put_edit(denoiser, changed)
    denoiser.save_pipeline(out)
    return None
