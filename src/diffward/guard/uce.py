"""Unified concept editing: keys and values of the cross-attention solved for, so that concepts give what a guide gives.

Gandikota et al. 2024 (arXiv 2308.14761), eq. 7. For every matrix W0 of attn2.to_k and attn2.to_v, with token
embeddings c_i to erase, p_j to preserve and wanted answers v_i, the minimiser over W of

    lam |W - W0|^2 + s_e sum_i |W c_i - v_i|^2 + s_p sum_j |W p_j - W0 p_j|^2.

The rest of the UNet stays. The two public codes pair tokens differently and give different edits: `pairing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffward.errors import InputError
from diffward.guard.subject import GUARDS, Found, Subject
from diffward.models.adapters import TEXT_SIDE
from diffward.models.parameters import parameters_of

if TYPE_CHECKING:
    from diffward.guard.settings import UceOptions
    from diffward.models.denoiser import Denoiser


@dataclass(frozen=True)
class Vectors:
    """Token embeddings, float64 on the CPU: `erased` (n, D), the guide's in their places (n, D), `kept` (m, D)."""

    erased: Tensor
    guide: Tensor
    kept: Tensor
    kept_scale: float


@GUARDS.register(
    "uce", paper="Gandikota et al. 2024 (arXiv 2308.14761)", access="base, words for the concepts",
    cost="one linear system; seconds", domains=(), options=frozenset({"uce", "concepts", "guide"}),
)  # fmt: skip
def uce(subject: Subject) -> Found:
    """Concepts erased in closed form: cross-attention keys and values that answer them as they answer the guide."""
    options, denoiser = subject.settings.uce, subject.denoiser
    vectors = embed(denoiser, subject.concepts, subject.guide, options)
    weights = text_side(denoiser)
    before = [weight.detach().cpu().double() for weight in weights.values()]
    after = solve(before, vectors, options)
    edited = {
        name: new.to(weight.dtype)
        for (name, weight), new in zip(weights.items(), after, strict=True)
    }
    stacked = torch.cat(before), torch.cat(after)
    aim = _wanted(before, vectors, options.technique)
    left = [float((vectors.erased @ w.T - aim).norm()) for w in stacked]
    kept = [vectors.kept @ w.T for w in stacked]
    return Found(
        edited=edited,
        facts={
            "concepts": len(dict.fromkeys(subject.concepts)), "preserved": len(_preserved(options)),
            "pairing": options.pairing, "technique": options.technique, "tensors": len(edited),
            # Parts of the way to the guide that are left, and of what was to be preserved that has changed.
            "erased_left": left[1] / left[0] if left[0] else 0.0,
            "preserved_changed": float((kept[1] - kept[0]).norm() / kept[0].norm()) if len(kept[0]) else 0.0,
        },
    )  # fmt: skip


def text_side(denoiser: Denoiser) -> dict[str, Tensor]:
    """The matrices of attn2.to_k and attn2.to_v by name, (out, D) each."""
    weights: dict[str, Tensor] = {
        name: parameter
        for name, parameter in parameters_of(denoiser.unet).items()
        if name.endswith(tuple(f".{module}.weight" for module in TEXT_SIDE))
    }
    if not weights:
        raise InputError(
            f"base {denoiser.name}: its UNet has no attn2.to_k or attn2.to_v; uce cannot edit it"
        )
    return weights


def embed(denoiser: Denoiser, concepts: Sequence[str], guide: str, options: UceOptions) -> Vectors:
    """Token embeddings of all texts, each text encoded once; a concept or text given twice counts once.

    Raises:
        InputError: no concepts; a text longer than the tokenizer's; a concept that is empty, equal to the
            guide, or to be preserved.
    """
    concepts, kept = list(dict.fromkeys(concepts)), _preserved(options)
    if not concepts:
        raise InputError("uce edits words, not pictures: name what to erase with --concepts")
    texts = list(dict.fromkeys([*concepts, guide, *kept]))
    ids = {text: _ids(denoiser, text) for text in texts}
    for concept in concepts:
        if len(ids[concept]) <= 2:
            raise InputError("--concepts: one of them has no word in it; take it out")
        if ids[concept] == ids[guide]:
            raise InputError(f"--concepts {concept!r}: is the guide; choose another --guide")
        if any(ids[concept] == ids[text] for text in kept):
            raise InputError(f"--concepts {concept!r}: is in --uce.preserve too; choose one")
    rows = dict(zip(texts, denoiser.condition(texts).double().cpu(), strict=True))
    last = {text: len(numbers) - 2 for text, numbers in ids.items()}
    length = denoiser.tokenizer.model_max_length
    pairs = [
        token_pairs(last[concept], last[guide], length, options.pairing) for concept in concepts
    ]
    whole = options.pairing == "last-to-padding"
    parts = [rows[text] if whole else rows[text][last[text], None] for text in kept]
    width = rows[guide].shape[-1]
    scale = options.preserve_scale
    if scale is None:
        scale = max(0.1, 1 / max(1, len(kept))) if whole else 1.0
    return Vectors(
        torch.cat([rows[concept][own] for concept, (own, _) in zip(concepts, pairs, strict=True)]),
        torch.cat([rows[guide][other] for _, other in pairs]),
        torch.cat(parts) if parts else torch.zeros(0, width, dtype=torch.float64),
        scale,
    )


def token_pairs(concept: int, guide: int, length: int, pairing: str) -> tuple[list[int], list[int]]:
    """Positions of a concept's tokens, and those of the guide's that stand in for them.

    Args:
        concept, guide: position of the last word's last token in either; 0, the start token, where
            there is no word.
        length: L, of the padded text.

    Returns:
        "last-token": those two. "last-to-padding": from them on, as many as there are after the later one.
    """
    count = 1 if pairing == "last-token" else length - max(concept, guide)
    return list(range(concept, concept + count)), list(range(guide, guide + count))


def solve(weights: Sequence[Tensor], vectors: Vectors, options: UceOptions) -> list[Tensor]:
    """The edited matrices (out_l, D), float64: one factorised system for all of them.

    In the form (W - W0) A = s_e sum_i (v_i - W0 c_i) c_i^T, A = lam I + s_e sum c c^T + s_p sum p p^T, so that
    what needs no change gets none.
    """
    erased, kept = vectors.erased, vectors.kept
    stacked = torch.cat([weight.double() for weight in weights])
    system = (
        options.lam * torch.eye(erased.shape[1], dtype=torch.float64)
        + options.erase_scale * erased.T @ erased
        + vectors.kept_scale * kept.T @ kept
    )
    missing = _wanted(weights, vectors, options.technique) - erased @ stacked.T
    change = torch.linalg.solve(system.T, options.erase_scale * erased.T @ missing).T
    return list((stacked + change).split([len(weight) for weight in weights]))


def _wanted(weights: Sequence[Tensor], vectors: Vectors, technique: str) -> Tensor:
    """v (n, sum of out_l): W0 g; with "tensor" less its projection, token by token, on W0 c of the same matrix."""
    parts = []
    for weight in weights:
        wanted = vectors.guide @ weight.double().T
        if technique == "tensor":
            own = torch.nn.functional.normalize(vectors.erased @ weight.double().T, dim=1)
            wanted = wanted - (wanted * own).sum(1, keepdim=True) * own
        parts.append(wanted)
    return torch.cat(parts, dim=1)


def _preserved(options: UceOptions) -> list[str]:
    return list(dict.fromkeys([*options.preserve, *([""] if options.keeps_empty else [])]))


def _ids(denoiser: Denoiser, text: str) -> list[int]:
    """Start token, words, end token; not padded."""
    ids = list(denoiser.tokenizer(text, verbose=False).input_ids)
    length = denoiser.tokenizer.model_max_length
    if len(ids) > length:
        raise InputError(
            f"uce: {text[:40]!r} has {len(ids) - 2} tokens, the base's text encoder takes {length - 2}; shorten it"
        )
    return ids
