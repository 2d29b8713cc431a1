"""The tokenizer of `mini`: CLIP's byte-level BPE, learned from the world's captions and everyday words.

Learned here and not by `tokenizers`' trainer, which breaks ties differently from run to run.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from diffward.models.mini import world

MAX_LENGTH = 48
_MERGES = 860
_START, _END = "<|startoftext|>", "<|endoftext|>"
# Words of captions that people bring themselves; each becomes a token or two.
_EVERYDAY = """a an the of in on at with and or by for from to my your this that photo picture image painting
drawing portrait logo icon brand sign style art artwork sketch neon mosaic watercolor person man woman girl boy
child people face head hand cat dog bird horse bear animal toy doll robot car bus bike train plane boat house
room city street tree flower grass beach sky mountain water table chair bowl cup can bottle box bag backpack
boot sneaker teapot vase candle clock sunglasses plush duck monster cartoon shoes shirt longsleeve outwear
pants shorts skirt dress hat jacket coat t-shirt jeans sweater wearing holding standing sitting looking front
back side view close up small big large old young new red orange yellow green blue purple pink white black
brown grey gray gold silver dark light bright background plain wooden floor wall day night sunny snow one two
three four five sks xyz ohwx zwx"""


def learn_merges(texts: list[str], count: int) -> list[tuple[str, str]]:
    """The first `count` byte-pair merges of a corpus (Sennrich et al. 2016), ties by spelling."""
    words = Counter(w for text in texts for w in re.findall(r"[a-z]+|[^\sa-z]+", text.lower()))
    spelt = {w: [*w[:-1], w[-1] + "</w>"] for w in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for w, parts in spelt.items():
            for pair in pairwise(parts):
                pairs[pair] += words[w]
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(best)
        for parts in spelt.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def build_tokenizer(folder: Path, seed: int, captions: int = 4000) -> CLIPTokenizer:
    """Learn the merges from `captions` captions and save the tokenizer in `folder`."""
    merges = learn_merges(
        [world.sample([seed, 4, i]).caption for i in range(captions)] + [_EVERYDAY] * 50, _MERGES
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # CLIP's order: bytes, bytes that end a word, merges, the two special tokens.
    tokens = [
        *alphabet,
        *(a + "</w>" for a in alphabet),
        *("".join(m) for m in merges),
        _START,
        _END,
    ]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer
