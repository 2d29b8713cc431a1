"""Reading the training words back from the weights of the cross-attention.

All its keys and values are fed the same vectors, the text encoder's states of the caption, and every step of
training adds multiples of these to the rows of A. So the right singular vectors of what was learned, taken over all
these modules, span more of a caption's states than of other words' (blind: neither the start nor any caption is
known). The text encoder is causal: the state of a word depends on the words before it alone, so a caption can be
decoded word by word, as DAGER (Petrov et al. 2024) does with gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffward.errors import InputError
from diffward.lora.canonical import canonical_factors, canonical_module

if TYPE_CHECKING:
    from diffward.inversion.zoo import Zoo
    from diffward.lora import LoraWeights
    from diffward.models.denoiser import Denoiser

KEYS_AND_VALUES = ("attn2.to_k", "attn2.to_v")
_BATCH = 2048


@dataclass(frozen=True)
class TextSpace:
    """The directions (D, D) of text states in which a LoRA learned, strongest first, with their shares (D,) of energy."""

    vectors: Tensor
    energy: Tensor

    @classmethod
    def of(cls, weights: LoraWeights) -> TextSpace:
        """From the canonical forms of the cross-attention's keys and values, each module counting alike.

        Raises:
            InputError: the LoRA adapts none of them.
        """
        total: Tensor | None = None
        for name, module in weights.modules.items():
            if not name.endswith(KEYS_AND_VALUES) or not name.startswith("unet."):
                continue
            one = canonical_module(module)
            share = one.sigma / one.sigma.norm().clamp_min(1e-12)
            moment = (one.v * share) @ (one.v * share).T
            total = moment if total is None else total + moment
        if total is None:
            raise InputError(
                "the LoRA does not adapt the cross-attention's keys and values: no words can be read from it"
            )
        values, vectors = torch.linalg.eigh(total.double())
        order = values.argsort(descending=True)
        values = values[order].clamp_min(0)
        return cls(vectors[:, order].float(), (values / values.sum().clamp_min(1e-12)).float())

    def score(self, states: Tensor) -> Tensor:
        """How much the LoRA learned along each state (n, D): x^T M x / x^T x of centred states, times D; 1 by chance."""
        turned = states @ self.vectors
        length = states.square().sum(-1).clamp_min(1e-12)
        return (turned.square() * self.energy).sum(-1) / length * len(self.energy)


def text_moment(zoo: Zoo, like: Tensor, most: int = 400) -> Tensor:
    """What LoRAs learn along in the mean (D, D): the moment of up to 400 of a zoo's training LoRAs; zeros if they adapt no text.

    Args:
        like: a matrix of the size wanted; of another width than the base's, zeros are given.
    """
    total, count = torch.zeros_like(like), 0
    rows = zoo.last_saves(zoo.of_split("train"))[:most]
    names = [n for n in zoo.head.modules if n.endswith(KEYS_AND_VALUES)]
    if not names or zoo.head.modules[names[0]][1] != len(like):
        return total
    for _, tensors in zoo.shards(rows):
        for name in names:
            one = canonical_factors(
                tensors[f"{name}.down"], tensors[f"{name}.up"], tensors[f"{name}.scale"]
            )
            share = one.sigma / one.sigma.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            scaled = one.v * share[:, None]
            total += (scaled @ scaled.mT).sum(0)
            count += len(share)
    return total / max(1, count)


class Words:
    """The vocabulary as a base's text encoder sees it, prefix by prefix."""

    def __init__(self, denoiser: Denoiser, seed: int = 0) -> None:
        self.denoiser = denoiser
        tokenizer = denoiser.tokenizer
        self.start, self.end = tokenizer.bos_token_id, tokenizer.eos_token_id
        special = set(tokenizer.all_special_ids)
        self.tokens = torch.tensor(
            [i for i in sorted(tokenizer.get_vocab().values()) if i not in special]
        )
        g = torch.Generator().manual_seed(seed)
        some = self.tokens[torch.randint(len(self.tokens), (256, 8), generator=g)]
        # What every state has in common tells nothing: the mean over random words, by position.
        self._centre = self.states(torch.cat([torch.full((256, 1), self.start), some], 1)).mean(0)

    @torch.no_grad()
    def states(self, ids: Tensor) -> Tensor:
        """Last hidden states (n, L, D) of token ids (n, L), not padded."""
        parts = [
            self.denoiser.embed(part.to(self.denoiser.device)).cpu() for part in ids.split(_BATCH)
        ]
        return torch.cat(parts)

    def centred(self, states: Tensor, position: int) -> Tensor:
        return states - self._centre[min(position, len(self._centre) - 1)]

    def ids(self, caption: str) -> list[int]:
        """Tokens of a caption, without start and end."""
        return list(self.denoiser.tokenizer(caption, add_special_tokens=False).input_ids)

    def text(self, ids: Sequence[int]) -> str:
        return str(self.denoiser.tokenizer.decode(list(ids))).strip()

    def caption_score(self, space: TextSpace, caption: str) -> float:
        """Mean score of a caption's words."""
        ids = self.ids(caption)
        if not ids:
            return 0.0
        states = self.states(torch.tensor([[self.start, *ids]]))[0]
        each = [space.score(self.centred(states[i], i)[None]) for i in range(1, len(states))]
        return float(torch.cat(each).mean())

    def next_scores(self, space: TextSpace, prefix: Sequence[int]) -> Tensor:
        """Scores of every token of `self.tokens` after a prefix."""
        head = torch.tensor([self.start, *prefix]).expand(len(self.tokens), -1)
        states = self.states(torch.cat([head, self.tokens[:, None]], 1))[:, -1]
        return space.score(self.centred(states, len(prefix) + 1))


@dataclass(frozen=True)
class Decoded:
    """A caption read from weights: tokens, text, and the score of each token."""

    ids: list[int]
    text: str
    scores: list[float]


def decode(space: TextSpace, words: Words, length: int = 8, beam: int = 4) -> list[Decoded]:
    """The captions that fit best, word by word; of each length, by mean score, best first."""
    beams: list[tuple[list[int], list[float]]] = [([], [])]
    for _ in range(length):
        grown = []
        for ids, scores in beams:
            found = words.next_scores(space, ids)
            for value, place in zip(*(x.tolist() for x in found.topk(beam)), strict=True):
                grown.append(([*ids, int(words.tokens[place])], [*scores, value]))
        beams = sorted(grown, key=lambda b: -sum(b[1]))[:beam]
    return [Decoded(ids, words.text(ids), scores) for ids, scores in beams]
