"""The score bank: what the adapted model and its base answer about N pictures.

answers[probe, model] is (N, …). Every attack is arithmetic on it, so attacks share what they ask:
the plain errors serve nearly all of them. The same (t, eps) pairs serve every picture and both
models (common random numbers), so that differences are not noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from diffward import __version__
from diffward.data import FeatureCache, cache_root
from diffward.errors import InputError
from diffward.membership import probes  # noqa: F401  (registers the probes)
from diffward.membership.layout import Layout
from diffward.membership.live import (
    Conditions,
    Crops,
    factor_shapes,
    fresh_factors,
    picture_key,
)
from diffward.membership.probe import BASE_CAPTION, OFF, ON, PROBES, Query
from diffward.models.pairs import Pairs
from diffward.progress import progress

if TYPE_CHECKING:
    from diffward.data import Pictures
    from diffward.lora import LoraWeights
    from diffward.membership.crossfit import Fit
    from diffward.membership.shadow import Shadows
    from diffward.models.denoiser import Denoiser
    from diffward.models.features import Features

__all__ = ["OFF", "ON", "Bank", "Layout", "Pairs", "bank_of_arrays", "build_bank"]


@dataclass(frozen=True)
class Bank:
    """Answers about N pictures, computed when they are first asked for.

    Attributes:
        ask: (probe, model) to (N, …).
        layout: the pairs.
        is_member: bool (N,). An attack must not look: `crossfit` does, and hides from each model the
            pictures that it will score.
        groups: (N,) near-duplicates share a number; None where every picture is its own.
        captions: whether the pictures have captions that tell them apart.
        shadows: errors under LoRAs trained on random halves of the same pictures, if there are any.
        absent: {what an attack may need ("shadows", "factors"): why it cannot be had here}.
        seed: of cross-fitting.
        base: whether this is a base playing the adapted model, the control.
        evaluations: {(probe, model): denoiser evaluations made}, filled as answers are computed.
    """

    ask: Callable[[str, str], np.ndarray]
    layout: Layout
    is_member: np.ndarray
    groups: np.ndarray | None = None
    captions: bool = True
    shadows: Shadows | None = None
    seed: int = 0
    base: bool = False
    absent: Mapping[str, str] = field(default_factory=dict)
    evaluations: dict[tuple[str, str], int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.is_member)

    def of(self, probe: str, model: str = ON) -> np.ndarray:
        """The answers (N, …), float64."""
        return self.ask(probe, model)

    def gain(self) -> np.ndarray:
        """What the adapter made easier (N, K): base error less error, one column a pair."""
        return self.of("errors", OFF) - self.of("errors", ON)

    def crossfit(self, features: np.ndarray, fit: Fit | None = None) -> np.ndarray:
        """Scores (N,) of a classifier that learns to tell members, each picture by models that never saw it."""
        from diffward.membership.crossfit import crossfit, logistic

        return crossfit(
            features, self.is_member, fit or logistic(), groups=self.groups, seed=self.seed
        )

    def as_base(self) -> Bank:
        """The bank of an audit of the base by itself: a control that must come out at chance.

        Of answers that run over pairs, even pairs play the adapter and odd pairs the base, so that
        a difference of the two is a real measurement and not zero by construction. Other answers
        have no second measurement: an attack must not calibrate them.
        """

        def ask(probe: str, model: str) -> np.ndarray:
            answers = self.ask(probe, OFF)
            if not PROBES[probe].extra["paired"]:
                if model == OFF:
                    raise ValueError(f"probe {probe!r} cannot be calibrated: it has no pairs")
                return answers
            size = answers.shape[-1] // 2
            return answers[..., (0 if model == ON else 1) :: 2][..., :size]

        return replace(self, ask=ask, layout=self.layout.halved(), base=True)


def bank_of_arrays(
    answers: Mapping[tuple[str, str], np.ndarray],
    is_member: np.ndarray,
    timesteps: np.ndarray | None = None,
    **more: object,
) -> Bank:
    """A bank of given answers, {(probe, model): (N, …)}."""
    ready = {key: np.asarray(value, dtype=np.float64) for key, value in answers.items()}
    if timesteps is None:
        count = ready["errors", ON].shape[1] if ("errors", ON) in ready else 16
        timesteps = ((np.arange(count) + 0.5) * 1000 / count).astype(int)
    layout = Layout.of(len(timesteps), np.asarray(timesteps))
    return Bank(lambda probe, model: ready[probe, model], layout, np.asarray(is_member), **more)  # type: ignore[arg-type]


def build_bank(
    denoiser: Denoiser,
    features: Features,
    pictures: Pictures,
    is_member: np.ndarray,
    pairs: Pairs,
    *,
    weights: LoraWeights | None = None,
    adapter_id: str | None = None,
    groups: np.ndarray | None = None,
    shadows: Shadows | None = None,
    absent: Mapping[str, str] | None = None,
    batch: int | None = None,
    seed: int = 0,
) -> Bank:
    """The bank of pictures on a denoiser with an adapter attached.

    Args:
        features: of `pictures`, in their order. All captions empty: they count as unknown.
        weights: the LoRA's, for white-box probes; of a full model the factors of its change.
        adapter_id: hash of the adapter's file: answers are then cached on disk, so that an
            interrupted audit goes on and the base's answers serve every LoRA. None keeps nothing.
        absent: what attacks may need and there is not, and why, as `Bank` has it.
        batch: denoiser inputs in one forward pass; what fits the size by default.

    Raises:
        InputError: when asked: an answer is not finite (a broken adapter).
    """
    batch, layout = batch or denoiser.unet_batch, Layout.of_pairs(pairs)
    keys = [picture_key(h, c) for h, c in zip(pictures.hashes, features.captions, strict=True)]
    conditions = Conditions(denoiser, features.captions)
    crops = Crops(denoiser, pictures, keep=adapter_id is not None)
    device = denoiser.device
    texts = torch.arange(len(keys), device=device)
    made: dict[tuple[str, str], int] = {}
    ready: dict[tuple[str, str], np.ndarray] = {}
    along: dict[str, LoraWeights] = {}
    kept: dict[str, dict[str, Any]] = {ON: {}, OFF: {}}

    def query(rows: Tensor, model: str) -> Query:
        def text(name: str) -> Tensor:
            plain = model == OFF or not denoiser.adapts_text
            if name == BASE_CAPTION or (name == "caption" and plain):
                return features.conditioning(rows)
            return conditions.of(name, model)[texts[rows]]

        def factors() -> LoraWeights:
            if model not in along:
                along[model] = fresh_factors(denoiser, weights, model, seed)
            return along[model]

        return Query(
            denoiser, features.latents[rows], rows, text, lambda share: crops.of(share)[rows.cpu()].to(device),
            pairs, factors, batch, model, kept[model],
        )  # fmt: skip

    def ask(probe: str, model: str) -> np.ndarray:
        if (probe, model) in ready:
            return ready[probe, model]
        entry = PROBES[probe]
        width = entry.extra.get("width") or max(1, entry.extra["evaluations"](layout))
        before = denoiser.evaluations
        with progress(f"ask {probe}, {model}", len(keys)) as bar:

            @torch.no_grad()
            def compute(indices: list[int]) -> Tensor:
                with denoiser.adapter(model == ON):
                    parts = []
                    size = max(1, batch // width)
                    for start in range(0, len(indices), size):
                        rows = torch.tensor(indices[start : start + size], device=device)
                        parts.append(entry.obj(query(rows, model)).float().cpu())
                        bar.advance(by=len(rows))
                return torch.cat(parts)

            root = cache_root() / "scores" if adapter_id is not None else None
            where = f"{__version__}-{probe}-{denoiser.unet_identity}-{denoiser.resolution}-{len(pairs)}-{pairs.seed}"
            who = adapter_id if model == ON else "base"
            if entry.extra.get("factors") and model == OFF:
                who = f"base-{seed}-{factor_shapes(weights)}"  # along fresh factors of these shapes
            store = FeatureCache(
                root, f"{where}-{denoiser.compute_dtype}-{who}".replace("torch.", "")
            )
            answers = store.get_or_compute(keys, compute, max(batch // width, 16)).double().numpy()
        if not np.isfinite(answers).all():
            raise InputError(
                "the model's errors are not finite with this adapter: the file is broken, or for another base"
            )
        made[probe, model] = denoiser.evaluations - before
        ready[probe, model] = answers
        return answers

    return Bank(
        ask, layout, np.asarray(is_member, dtype=bool), groups, any(features.captions), shadows, seed,
        absent=absent or {}, evaluations=made,
    )  # fmt: skip


def evaluations_made(banks: Sequence[Bank]) -> int:
    """Denoiser evaluations that these banks cost."""
    return sum(sum(bank.evaluations.values()) for bank in banks)
