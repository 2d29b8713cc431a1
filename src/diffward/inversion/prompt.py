"""Reading the training words back from the weights of the cross-attention.

All its keys and values are fed the same vectors, the text encoder's states of the caption, and every step of
training adds multiples of these to the rows of A. So the right singular vectors of what was learned, taken over all
these modules, span more of a caption's states than of other words' (blind: neither the start nor any caption is
known). The text encoder is causal: the state of a word depends on the words before it alone, so a caption can be
decoded word by word, as DAGER (Petrov et al. 2024, arXiv 2405.15586) does with gradients. Where a zoo is at hand,
what every LoRA learns along can be discounted (`metric`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffward.errors import InputError
from diffward.lora.canonical import Canonical, canonical_factors, canonical_module

if TYPE_CHECKING:
    from diffward.inversion.zoo import Row, Zoo
    from diffward.lora import LoraWeights
    from diffward.models.denoiser import Denoiser

KEYS_AND_VALUES = ("attn2.to_k", "attn2.to_v")
_BATCH = 2048
_TINY = 1e-12


def evidence(weights: LoraWeights) -> Tensor:
    """Along which text states (D, D) a LoRA learned: the mean of V sigma^2 V^T over its keys and values, each of trace 1.

    Raises:
        InputError: it adapts none of them.
    """
    found = [
        _moment(canonical_module(module))
        for name, module in weights.modules.items()
        if name.startswith("unet.") and name.endswith(KEYS_AND_VALUES)
    ]
    if not found:
        raise InputError(
            "the LoRA does not adapt the cross-attention's keys and values: no words can be read from it"
        )
    return torch.stack(found).mean(0)


def zoo_evidence(zoo: Zoo, rows: Sequence[Row]) -> Tensor | None:
    """That of some saves of a zoo, (n, D, D); None if its LoRAs adapt no text."""
    names = [n for n in zoo.head.modules if n.endswith(KEYS_AND_VALUES)]
    if not names:
        return None
    parts: dict[int, Tensor] = {}
    for numbers, tensors in zoo.shards(rows):
        total: Tensor | float = 0.0
        for name in names:
            one = canonical_factors(
                *(tensors[f"{name}.{role}"] for role in ("down", "up", "scale"))
            )
            total = total + _moment(one) / len(names)
        assert isinstance(total, Tensor)
        parts |= dict(zip(numbers, total, strict=True))
    return torch.stack([parts[i] for i in range(len(rows))])


def metric(moment: Tensor) -> Tensor:
    """What discounts directions (D, D) along which LoRAs learn anyway: (M + I tr M / D)^-1."""
    size = len(moment)
    eye = torch.eye(size, dtype=moment.dtype)
    return torch.linalg.inv(moment + eye * moment.trace().clamp_min(_TINY) / size)


def score(found: Tensor, states: Tensor, metric: Tensor | None = None) -> Tensor:
    """How much was learned along each state: x^T P E P x / x^T P x, in units of the mean over directions.

    Args:
        found: evidence E (..., D, D).
        states: centred states x (n, D).
        metric: P; the identity by default.

    Returns:
        (..., n); 1 by chance.
    """
    turned = states if metric is None else states @ metric
    along = ((turned @ found) * turned).sum(-1)
    length = (turned * states).sum(-1).clamp_min(_TINY)
    inner = found if metric is None else found @ metric
    mean = inner.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(_TINY) / states.shape[-1]
    return along / length / mean[..., None]


class Words:
    """The vocabulary as a base's text encoder sees it, prefix by prefix."""

    def __init__(self, denoiser: Denoiser, seed: int = 0) -> None:
        self.denoiser = denoiser
        tokenizer = denoiser.tokenizer
        self.start = tokenizer.bos_token_id
        special = set(tokenizer.all_special_ids)
        self.tokens = torch.tensor(
            [i for i in sorted(tokenizer.get_vocab().values()) if i not in special]
        )
        g = torch.Generator().manual_seed(seed)
        some = self.tokens[torch.randint(len(self.tokens), (256, 12), generator=g)]
        # What every state has in common tells nothing: the mean over random words, by position.
        self._centre = self.states(torch.cat([torch.full((256, 1), self.start), some], 1)).mean(0)

    @torch.no_grad()
    def states(self, ids: Tensor) -> Tensor:
        """Last hidden states (n, L, D) of token ids (n, L), not padded."""
        device = self.denoiser.device
        return torch.cat([self.denoiser.embed(part.to(device)).cpu() for part in ids.split(_BATCH)])

    def ids(self, caption: str) -> list[int]:
        """Tokens of a caption, without start and end, as many as the text encoder takes."""
        tokenizer = self.denoiser.tokenizer
        return list(tokenizer(caption, add_special_tokens=False).input_ids)[
            : tokenizer.model_max_length - 2
        ]

    def text(self, ids: Sequence[int]) -> str:
        return str(self.denoiser.tokenizer.decode(list(ids))).strip()

    def centred(self, ids: Tensor) -> Tensor:
        """Centred states (n, L, D) of words, ids (n, L) without the start."""
        states = self.states(torch.cat([torch.full((len(ids), 1), self.start), ids], 1))[:, 1:]
        last = len(self._centre) - 1
        return states - self._centre[[min(1 + i, last) for i in range(states.shape[1])]]

    def caption_scores(
        self, found: Tensor, captions: Tensor, metric: Tensor | None = None
    ) -> Tensor:
        """Mean score (m, n) of n captions, ids (n, L), under evidence (m, D, D)."""
        states = self.centred(captions)
        flat = score(found, states.flatten(0, 1), metric)
        return flat.view(len(found), *captions.shape).mean(-1)

    def next_scores(
        self, found: Tensor, prefix: Sequence[int], metric: Tensor | None = None
    ) -> Tensor:
        """Scores of every token of `self.tokens` after a prefix, under evidence (D, D)."""
        head = torch.tensor(list(prefix), dtype=torch.long).expand(len(self.tokens), -1)
        return score(found, self.centred(torch.cat([head, self.tokens[:, None]], 1))[:, -1], metric)


@dataclass(frozen=True)
class Decoded:
    """A caption read from weights: tokens, text, and the score of each token."""

    ids: list[int]
    text: str
    scores: list[float]


def decode(
    found: Tensor, words: Words, length: int = 6, beam: int = 3, metric: Tensor | None = None
) -> list[Decoded]:
    """The captions that fit evidence (D, D) best, word by word, by mean score, best first."""
    beams: list[tuple[list[int], list[float]]] = [([], [])]
    for _ in range(length):
        grown = []
        for ids, scores in beams:
            best = words.next_scores(found, ids, metric).topk(beam)
            for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                grown.append(([*ids, int(words.tokens[place])], [*scores, value]))
        beams = sorted(grown, key=lambda b: -sum(b[1]))[:beam]
    return [Decoded(ids, words.text(ids), scores) for ids, scores in beams]


@dataclass(frozen=True)
class CaptionFit:
    """How a known caption fits, against three null distributions; each p is (1 + those that fit as well) / (1 + all).

    p_others   other LoRAs that the caption fits as well
    p_words    captions of random words of its length that fit this LoRA as well
    p_rivals   captions of the owner's held-out pictures that do; None where there are fewer than 19 others
    """

    caption: str
    score: float
    p_others: float
    p_words: float
    p_rivals: float | None = None

    @property
    def p_value(self) -> float:
        return max(self.p_others, self.p_words, self.p_rivals or 0.0)


def caption_fit(
    found: Tensor, others: Tensor, words: Words, caption: str, metric: Tensor | None,
    rivals: Sequence[str] = (), count: int = 400, seed: int = 0,
) -> CaptionFit:  # fmt: skip
    """A caption under a LoRA's evidence (D, D).

    Args:
        others: other LoRAs' evidence, factored (m, D, k) as `strongest` gives it; this LoRA's is cut alike.
        rivals: captions of the same kind that did not train.
        count: captions of random words.

    Raises:
        InputError: the caption is empty, or there are no others.
    """
    ids = words.ids(caption)
    if not ids:
        raise InputError("an empty caption has no words to look for")
    if not len(others):
        raise InputError("there are no other LoRAs to compare with")
    g = torch.Generator().manual_seed(seed)
    decoys = words.tokens[torch.randint(len(words.tokens), (count, len(ids)), generator=g)]
    roots = torch.cat([strongest(found[None], others.shape[2]), others])
    every = roots @ roots.mT
    own = words.caption_scores(every, torch.tensor([ids]), metric)[:, 0]
    against = words.caption_scores(every[:1], decoys, metric)[0]

    def p(cases: Tensor) -> float:
        return (1 + int((cases >= own[0]).sum())) / (1 + len(cases))

    beside = [words.ids(text) for text in dict.fromkeys(rivals) if text and text != caption]
    scores = [
        words.caption_scores(every[:1], torch.tensor([one]), metric)[0] for one in beside if one
    ]
    return CaptionFit(
        caption,
        float(own[0]),
        p(own[1:]),
        p(against),
        p(torch.cat(scores)) if len(scores) >= 19 else None,
    )


def strongest(found: Tensor, count: int) -> Tensor:
    """The strongest directions of evidence (n, D, D), factored: (n, D, count), whose squares give the evidence cut to them."""
    values, vectors = torch.linalg.eigh(found)
    return vectors[..., -count:] * values[..., -count:].clamp_min(0).sqrt()[..., None, :]


def _moment(one: Canonical) -> Tensor:
    """V sigma^2 V^T (..., in, in) of trace 1."""
    share = one.sigma / one.sigma.norm(dim=-1, keepdim=True).clamp_min(_TINY)
    scaled = one.v * share.unsqueeze(-2)
    return scaled @ scaled.mT
