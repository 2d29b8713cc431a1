"""Captions without their most telling words (CLiD, Zhai et al. 2024, arXiv 2405.14800, sec. 3.5 and D.2).

The paper replaces the most important 30, 50 and 70 % of the words with the padding token. It takes a
word's importance from cross-attention maps of generated pictures (DAAM), which cost a sampling run a
caption. Here it is how far the text encoder's summary of the caption (its end-of-text embedding)
moves when the word is left out: text only, of the untouched base, so it tells nothing of members.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser

SHARES = (0.3, 0.5, 0.7)
_BATCH = 64


def reduced_captions(denoiser: Denoiser, captions: Sequence[str]) -> list[list[str]]:
    """For each share of `SHARES`, the captions without that share of their most telling words.

    ceil(share * words) of them become padding; the others keep their places. A caption of one word
    becomes the empty one, an empty caption stays.
    """
    distinct = list(dict.fromkeys(captions))
    ranked = dict(zip(distinct, _by_importance(denoiser, distinct), strict=True))
    padding = str(denoiser.tokenizer.pad_token)
    return [[_without(c, ranked[c], share, padding) for c in captions] for share in SHARES]


def _without(caption: str, ranked: list[int], share: float, padding: str) -> str:
    # Rounded first: 0.7 * 10 is a little more than 7.
    gone = set(ranked[: math.ceil(round(share * len(ranked), 6))])
    if len(gone) == len(ranked):
        return ""
    words = caption.split()
    return " ".join(padding if i in gone else word for i, word in enumerate(words))


def _by_importance(denoiser: Denoiser, captions: Sequence[str]) -> list[list[int]]:
    """For each caption the positions of its words, the most telling first, ties in reading order."""
    texts: list[str] = []
    for caption in captions:
        words = caption.split()
        texts.append(" ".join(words))
        texts += [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))]
    # Captions share shortened forms ("a red cup", "a blue cup"): encode each once.
    distinct = list(dict.fromkeys(texts))
    summary = dict(zip(distinct, _summaries(denoiser, distinct), strict=True))
    ranked, start = [], 0
    for caption in captions:
        count = len(caption.split())
        whole, *parts = (summary[text] for text in texts[start : start + count + 1])
        moved = [float((part - whole).norm()) for part in parts]
        ranked.append(sorted(range(count), key=lambda i: (-moved[i], i)))
        start += count + 1
    return ranked


@torch.no_grad()
def _summaries(denoiser: Denoiser, texts: Sequence[str]) -> Tensor:
    """End-of-text embedding (n, D) of each text, by the base's encoder, on the CPU."""
    off = denoiser.adapter(False) if denoiser.adapts_text else contextlib.nullcontext()
    parts = []
    with off:
        for start in range(0, len(texts), _BATCH):
            ids = denoiser.tokenize(texts[start : start + _BATCH])
            # The first one: in the encoders of SD 1.x padding is end-of-text as well.
            end = (ids == denoiser.tokenizer.eos_token_id).int().argmax(dim=1)
            hidden = denoiser.embed(ids)
            parts.append(hidden[torch.arange(len(ids), device=hidden.device), end].cpu())
    return torch.cat(parts) if parts else torch.empty(0)
