"""Shadow LoRAs: LoRAs like the audited one, trained on random halves of the pictures.

Nothing here knows which pictures the audited LoRA was trained on.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffward.errors import InputError
from diffward.files import write_json
from diffward.finetune.settings import Settings, identity_of
from diffward.membership.bank import OFF, ON, Pairs, build_bank
from diffward.membership.live import picture_key
from diffward.membership.shadow_gains import LEAST, Shadows, halves, leave_one_out, role_swapped
from diffward.membership.shadow_train import train_shadows
from diffward.models.adapters import TARGETS

if TYPE_CHECKING:
    from diffward.data import Pictures
    from diffward.finetune.method import Method
    from diffward.lora import LoraWeights
    from diffward.models.denoiser import Denoiser
    from diffward.models.features import Features

__all__ = [
    "Shadows", "build_shadows", "halves", "leave_one_out", "role_swapped", "shadow_settings",
]  # fmt: skip
_STREAM = 0x5AD1  # of seeds that no other training uses
_NOT_TRAINING = ("checkpoint_every", "sample_every", "sample_prompts", "track")


def shadow_settings(
    weights: LoraWeights, passes: float, lr: float = 1e-3, batch: int = 8, seed: int = 0
) -> Settings:
    """Settings of shadows for a LoRA of which only the file is known.

    Rank, alpha, adapted modules of the UNet and whether the text encoder is adapted are read from the
    file: the commonest rank and alpha where modules differ, and kinds of modules, not single ones. A
    LoHa, LoKr or DoRA gets plain LoRAs of its rank. `weights` must have names (be resolved).

    Args:
        passes: how often each picture was shown.
    """
    unet = {n.removeprefix("unet."): m for n, m in weights.modules.items() if n.startswith("unet.")}
    if not unet:
        raise InputError(f"{weights.source or 'this LoRA'}: adapts no named module of the UNet")
    sizes = Counter((module.rank, float(module.effective_alpha)) for module in unet.values())
    rank, alpha = sizes.most_common(1)[0][0]
    ends = {_kind(name) for name in unet}
    both = {e[6:] for e in ends if e.startswith("attn1.") and f"attn2.{e[6:]}" in ends}
    kinds = {e[6:] if e.startswith("attn") and e[6:] in both else e for e in ends}
    preset = next((name for name, suffixes in TARGETS.items() if set(suffixes) == kinds), None)
    return Settings(
        epochs=passes, batch=batch, lr=lr, rank=rank, alpha=alpha, seed=seed,
        targets=preset or ",".join(sorted(kinds)),
        text_encoder=any(n.startswith("text_encoder.") for n in weights.modules),
    )  # fmt: skip


def _kind(name: str) -> str:
    """The end of a module's name that says what it is: attn1.to_q, ff.net.2, conv1; else all of it."""
    end = next((t for t in TARGETS["all"] if name == t or name.endswith(f".{t}")), name)
    parent = name.removesuffix(end).rstrip(".").rpartition(".")[2]
    return f"{parent}.{end}" if parent in ("attn1", "attn2") else end


def build_shadows(
    denoiser: Denoiser,
    features: Features,
    pictures: Pictures,
    pairs: Pairs,
    settings: Settings,
    folder: Path,
    *,
    count: int = 8,
    seed: int = 0,
    attached: LoraWeights | None = None,
    cluster: str | None = None,
    batch: int | None = None,
    groups: np.ndarray | None = None,
    method: Method | None = None,
    cache: bool = True,
) -> Shadows:
    """Train `count` shadow LoRAs, those that `folder` does not hold yet, and measure all pictures.

    The same call again goes on where it was stopped; a larger `count` adds to what is there.

    Args:
        features: of `pictures`, in their order.
        settings: of each shadow; all make as many steps, those of half the pictures.
        folder: of the LoRAs and checkpoints; with a cluster, one that all its machines see. What is
            in it was trained on pictures whose membership is asked about: it is not for passing on.
        attached: the adapter to put back on the denoiser in the end.
        cluster: None, or "ray": groups of shadows become Ray tasks.
        batch: denoiser inputs in one pass of the measurement.
        groups: (N,) near-duplicates share a number; they are looked for by default.
        method: how they are trained; plainly by default.
        cache: keep the measured errors on disk.

    Raises:
        InputError: `folder` holds something else; Ray is asked for and not installed.
    """
    if settings.tune != "lora" or settings.flip:
        raise InputError(
            "shadows are LoRAs trained on the pictures as they are (no --tune full, no --flip)"
        )
    inside = halves(pictures, count, seed, groups)
    steps = settings.total_steps(len(pictures) // 2)
    settings = replace(settings, steps=steps, sample_every=0, track="none")
    folder = folder.resolve()
    _claim(folder, _fingerprint(denoiser, features, pictures, settings, seed, method, inside))
    files = [folder / f"shadow-{s:03d}.safetensors" for s in range(count)]
    own = [replace(settings, seed=_start(settings.seed, seed, s)) for s in range(count)]
    try:
        train_shadows(denoiser, features, inside, own, files, cluster=cluster, method=method)
        return _measure(denoiser, features, pictures, pairs, inside, files, batch, cache)
    finally:
        denoiser.attach(attached) if attached else denoiser.detach()


def _measure(
    denoiser: Denoiser, features: Features, pictures: Pictures, pairs: Pairs, inside: np.ndarray,
    files: list[Path], batch: int | None, cache: bool,
) -> Shadows:  # fmt: skip
    from diffward.lora import open_lora

    unknown = np.zeros(len(pictures), dtype=bool)
    errors, base = [], None
    for file in files:
        opened = open_lora(file)
        denoiser.attach(opened.load())
        bank = build_bank(
            denoiser, features, pictures, unknown, pairs, adapter_id=opened.sha256 if cache else None, batch=batch
        )  # fmt: skip
        errors.append(bank.of("errors", ON))
        base = bank.of("errors", OFF) if base is None else base
    everything = np.stack(errors)
    return Shadows((base - everything).mean(axis=2), inside, everything, base)


def _start(*numbers: int) -> int:
    """A seed of its own for each shadow's training."""
    return int(np.random.SeedSequence([*numbers, _STREAM]).generate_state(1)[0])


def _fingerprint(
    denoiser: Denoiser, features: Features, pictures: Pictures, settings: Settings, seed: int,
    method: Method | None, inside: np.ndarray,
) -> dict[str, Any]:  # fmt: skip
    """What the shadows of a folder have in common. Pictures only as a hash: no names, no captions."""
    keys = sorted(picture_key(h, c) for h, c in zip(pictures.hashes, features.captions))
    order = sorted(range(len(pictures)), key=pictures.hashes.__getitem__)
    return {
        "what": "diffward shadow LoRAs",
        "base": f"{denoiser.unet_identity}-{denoiser.resolution}-{denoiser.compute_dtype}",
        "pictures": sha256("".join(keys).encode()).hexdigest(),
        # More of them may follow; these would also change with what counts as a near-duplicate.
        "halves": sha256(inside[:LEAST, order].tobytes()).hexdigest(),
        "method": type(method).__name__ if method else "plain",
        "seed": seed,
        **{
            k: v for k, v in identity_of(settings).items() if k not in _NOT_TRAINING and k != "seed"
        },
        "start": settings.seed,
    }


def _claim(folder: Path, run: dict[str, Any]) -> None:
    """Make `folder` this run's, or raise `InputError` if it is something else's."""
    path = folder / "manifest.json"
    if not path.exists():
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise InputError(
                f"{folder}: is not a folder of shadow LoRAs and not empty; choose another"
            )
        write_json(path, run)
        return
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read; choose another folder") from error
    changed = sorted(k for k in run.keys() | found.keys() if run.get(k) != found.get(k))
    if changed:
        raise InputError(
            f"{folder}: holds shadow LoRAs of a run with another {', '.join(changed)}; choose another folder, "
            "or delete it to start anew"
        )
