"""The membership part of an audit: the bank, the attacks, the controls, the canaries."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffward.data import Pictures
from diffward.errors import InputError
from diffward.report.build import PerImage
from diffward.report.sides import Sides
from diffward.report.subject import Audited, open_audited

if TYPE_CHECKING:
    from diffward.lora import LoraWeights
    from diffward.membership.shadow import Shadows
    from diffward.membership.statistics import ChanceCheck
    from diffward.models.denoiser import Denoiser
    from diffward.models.features import Features

MOST_BLIND_SIZE = 128  # the blind control looks at pictures no larger than this
CANARY_ATTACK = "calibrated"  # named before any score is seen


@dataclass(frozen=True)
class AuditOptions:
    """How hard an audit looks.

    Attributes:
        attacks: "standard", "thorough", or names with commas between.
        captions: whether the attacker knows the captions; "unknown" leaves them out.
        pairs: noise draws a picture.
        canaries: also bound epsilon from below; the split must be one of coin flips.
        shadows: how many shadow LoRAs to train; 0 for none.
        shadow_epochs, shadow_lr, shadow_schedule: how they are trained; they should be like the LoRA's own.
        shadow_folder: where they are kept.
        cluster: "ray" trains them as Ray tasks.
        batch: denoiser inputs in one pass; None: what fits the size.
        cache: keep answers on disk.
    """

    attacks: str = "standard"
    captions: str = "known"
    pairs: int = 16
    canaries: bool = False
    shadows: int = 0
    shadow_epochs: float = 50.0
    shadow_lr: float = 1e-3
    shadow_schedule: str = "constant"
    shadow_folder: Path | None = None
    cluster: str | None = None
    batch: int | None = None
    seed: int = 0
    cache: bool = True

    def __post_init__(self) -> None:
        if self.captions not in ("known", "unknown"):
            raise InputError(f"--captions {self.captions}: choose known or unknown")
        least = {"pairs": 2, "seed": 0, "shadows": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least {value}")
        if self.shadows % 2 or 0 < self.shadows < 4:
            raise InputError(f"--shadows {self.shadows}: must be even, and at least 4")
        if self.batch is not None and self.batch < 1:
            raise InputError(f"--batch {self.batch}: must be at least 1")


def audit_membership(
    denoiser: Denoiser, file: str | Path | Audited, sides: Sides, options: AuditOptions
) -> tuple[dict[str, Any], PerImage]:
    """The `membership` part of the report and the scores of the pictures.

    Raises:
        InputError: the file is for another base, or canaries are asked for on a split without coins.
    """
    from diffward.membership.bank import Pairs, build_bank
    from diffward.membership.evaluate import chosen_attacks, run_attacks, wants_factors
    from diffward.models.features import encode_pictures

    entries = chosen_attacks(options.attacks)
    if options.canaries:
        if not sides.coin:
            raise InputError(
                "--canaries: epsilon needs a split in which a coin decided each picture alone; make it with "
                "diffward split --canaries and train with it"
            )
        if CANARY_ATTACK not in {e.name for e in entries}:
            entries += chosen_attacks(CANARY_ATTACK)
    audited: Audited
    if isinstance(file, str | Path):
        audited = open_audited(file, shadows=options.shadows)
    else:
        audited = file
    weights = audited.attach(denoiser)
    pictures = sides.everyone
    features = encode_pictures(denoiser, pictures, cache=options.cache)
    if options.captions == "unknown":
        features = _without_captions(denoiser, features)
    drawn = Pairs.draw(denoiser, options.pairs, options.seed)
    groups = picture_groups(pictures)
    bank = build_bank(
        denoiser, features, pictures, sides.is_member, drawn,
        weights=weights() if wants_factors(entries) else None, absent=audited.absent,
        adapter_id=audited.sha256 if options.cache else None, groups=groups, batch=options.batch, seed=options.seed,
        shadows=_shadows(denoiser, features, pictures, drawn, weights(), groups, options) if options.shadows else None,
    )  # fmt: skip
    blind = blind_check(pictures, sides.is_member, groups, denoiser.resolution, options.seed)
    found = run_attacks(bank, blind, entries=entries, seed=options.seed)
    membership: dict[str, Any] = {
        "attacks": found.figures,
        "skipped": found.skipped,
        "captions": options.captions if any(pictures.captions) else "none",
        "evaluations_per_image": {"made": found.made, "one_by_one": found.alone},
        "exposure": audited.exposure(),
        "dataset_inference": _dataset_inference(bank, found.scores, options.seed),
        "epsilon": _epsilon(found.scores, sides) if options.canaries else None,
    }
    per_image: PerImage = {
        "file": [p.name or p.path.name for p in pictures],
        "sha256": pictures.hashes,
        "member": sides.is_member.tolist(),
        "scores": {name: s.tolist() for name, s in found.scores.items()},
    }
    return membership, per_image


def picture_groups(pictures: Pictures) -> np.ndarray:
    """(N,) the same number for near-duplicates."""
    from diffward.data import near_duplicate_groups

    groups = np.zeros(len(pictures), dtype=int)
    for number, group in enumerate(near_duplicate_groups(pictures)):
        groups[group] = number
    return groups


def blind_check(
    pictures: Pictures, is_member: np.ndarray, groups: np.ndarray, resolution: int, seed: int
) -> ChanceCheck | None:
    """The blind control: do the two sides differ by themselves? None where a side is one scene."""
    from diffward.membership.blind import blind_control, blind_features, file_stats

    pixels = pictures.pixels(min(MOST_BLIND_SIZE, resolution))
    features = blind_features(pixels, pictures.captions, [file_stats(p.path) for p in pictures])
    if min(len(set(groups[is_member])), len(set(groups[~is_member]))) < 2:
        return None
    return blind_control(features, is_member, seed, groups)[1]


def _without_captions(denoiser: Denoiser, features: Features) -> Features:
    from diffward.models.features import encode_captions

    captions = [""] * len(features)
    embeddings, index = encode_captions(denoiser, captions, cache=False)
    return replace(features, captions=captions, _embeddings=embeddings, _caption_index=index)


def _shadows(
    denoiser: Denoiser, features: Features, pictures: Pictures, pairs: Any, weights: LoraWeights,
    groups: np.ndarray, options: AuditOptions,
) -> Shadows:  # fmt: skip
    from diffward.membership.shadow import build_shadows, shadow_settings

    named = weights.resolve(denoiser.module_shapes())
    settings = shadow_settings(
        named, options.shadow_epochs, lr=options.shadow_lr, seed=options.seed
    )
    settings = replace(settings, schedule=options.shadow_schedule)
    folder = options.shadow_folder or Path("runs/shadows")
    return build_shadows(
        denoiser, features, pictures, pairs, settings, folder, count=options.shadows, seed=options.seed,
        attached=weights, cluster=options.cluster, batch=options.batch, groups=groups, cache=options.cache,
    )  # fmt: skip


def _dataset_inference(
    bank: Any, scores: dict[str, np.ndarray], seed: int
) -> dict[str, Any] | None:
    from diffward.membership.dataset_inference import dataset_inference

    if "cdi" not in scores:
        return None
    return dataset_inference(scores["cdi"], bank.is_member, bank.groups, seed)


def _epsilon(scores: dict[str, np.ndarray], sides: Sides) -> dict[str, Any]:
    from dataclasses import asdict

    from diffward.membership.epsilon import epsilon_lower_bound

    return {
        "attack": CANARY_ATTACK,
        **asdict(epsilon_lower_bound(scores[CANARY_ATTACK], sides.is_member)),
    }
