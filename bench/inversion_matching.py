"""Words read from weights, and gradient matching."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from bench.weight_inversion import Rows, Setting
    from diffward.inversion.data import Data

MATCHED, KNOWN = 8, 20


def prompts(setting: Setting) -> Rows:
    """Captions of the zoo's victims: where each word stands in the vocabulary, and which of all captions fits best.

    Blind (no zoo), and with what LoRAs learn anyway discounted; by rank of the LoRA.
    """
    from diffward.inversion.prompt import Words, metric, zoo_evidence

    material, denoiser = setting.material, setting.denoiser
    data = material.test.last()
    rows = [r for r in data.rows if r.recipe["template"] != "captions"]
    rows = sorted(rows, key=lambda r: -r.step)[: 6 if setting.quick else 100]
    found = zoo_evidence(material.zoo, rows)
    assert found is not None
    words = Words(denoiser)
    ids = [words.ids(r.recipe["template"].replace("{name}", r.recipe["word"])) for r in rows]
    result: Rows = []
    for name, discount in (("blind", None), ("discounted", metric(setting.inverter.moment))):
        scores = np.stack([
            words.caption_scores(found, torch.tensor([one]), discount)[:, 0].numpy() for one in ids
        ])  # (caption, LoRA)  # fmt: skip
        top = scores.argmax(0) == np.arange(len(rows))
        places, trigger = [], []
        for i, one in list(enumerate(ids))[: 1 if setting.quick else 30]:
            for j, token in enumerate(one):
                each = words.next_scores(found[i], one[:j], discount)
                place = int((each > each[words.tokens.tolist().index(token)]).sum())
                places.append(place / len(words.tokens))
                if rows[i].recipe["template"] == "{name}":
                    trigger.append(place / len(words.tokens))
        for which, keep in (
            ("all", lambda r: True), ("rank 8 and 16", lambda r: r.recipe["rank"] >= 8), ("rank 1 and 2", lambda r: r.recipe["rank"] <= 2),
        ):  # fmt: skip
            chosen = np.array([keep(r) for r in rows])
            if chosen.any():
                result.append({
                    "method": f"words, {name}", "decoder": "caption", "control": which, "victims": int(chosen.sum()),
                    "gallery": len(rows), "top1": float(top[chosen].mean()),
                    **({"word_place_median": float(np.median(places)), "words_in_top_ten": float(np.mean(np.array(places) * len(words.tokens) < 10))} if which == "all" else {}),
                })  # fmt: skip
    return result


def matching(setting: Setting) -> Rows:
    """Gradient matching: pictures searched for from noise, and known pictures told apart by their cosine."""
    from bench.inversion_decoders import longest

    victims = longest(setting, 2 if setting.quick else MATCHED)
    return [
        *_searched(setting, victims),
        *_known(setting, longest(setting, 2 if setting.quick else KNOWN)),
    ]


def _searched(setting: Setting, victims: Data) -> Rows:
    """Against random latents, and against another victim's attributes."""
    from diffward.inversion.matching import match_gradients
    from diffward.models.mini.attributes import Person
    from diffward.models.mini.reader import load_reader

    reader, denoiser = load_reader(), setting.denoiser

    def hits(latents: torch.Tensor, label: tuple[int, ...]) -> float:
        seen = reader.read(denoiser.decode(latents))
        return float(
            np.mean([(seen[n] == v).mean() for n, v in Person(label).attributes().items()])
        )

    found: dict[str, list[float]] = {"own": [], "other": [], "random latents": []}
    cosines = []
    for i, one in enumerate(victims.rows):
        made = match_gradients(
            denoiser, setting.material.zoo.lora(one), pictures=2, pairs=2, lr=0.15, seed=i,
            steps=5 if setting.quick else 60,
        )  # fmt: skip
        g = torch.Generator().manual_seed(i)
        found["own"].append(hits(made.latents, one.label))
        found["other"].append(hits(made.latents, victims.rows[i - 1].label))
        found["random latents"].append(
            hits(torch.randn(made.latents.shape, generator=g), one.label)
        )
        cosines.append((float(made.history[0]), float(made.history[-1])))
    first, last = np.mean(cosines, axis=0)
    return [
        {
            "method": "gradient matching", "decoder": "latents", "control": name, "victims": len(victims),
            "attribute_accuracy": float(np.mean(values)), "cosine_first": float(first), "cosine_last": float(last),
        }
        for name, values in found.items()
    ]  # fmt: skip


def _known(setting: Setting, victims: Data) -> Rows:
    """Single known pictures, no caption: training pictures, others of the person, strangers; mean AUC over victims."""
    from sklearn.metrics import roc_auc_score

    from diffward.inversion.matching import Matching
    from diffward.models.pairs import Pairs

    subjects, denoiser = setting.material.subjects, setting.denoiser
    null, pairs = denoiser.condition([""]), Pairs.draw(denoiser, 8, 0)
    auc: dict[str, list[float]] = {
        "training pictures against others of the person": [],
        "the person against strangers": [],
    }
    for one in victims.rows:
        sides = [
            subjects.pictures(one.identity, min(6, one.recipe["pictures"]), [1, one.lora]),
            subjects.pictures(one.identity, 6, [7]),
            [subjects.pictures(5 * 10**6 + 10 * one.lora + j, 1, [7])[0] for j in range(6)],
        ]
        match = Matching(denoiser, setting.material.zoo.lora(one), pairs)
        scores = [
            [float(match.cosines(denoiser.encode(p.pixels[None]), null).mean()) for p in side]
            for side in sides
        ]
        for name, (own, rest) in zip(
            auc, ((scores[0], scores[1]), (scores[1], scores[2])), strict=True
        ):
            auc[name].append(float(roc_auc_score([1] * len(own) + [0] * len(rest), [*own, *rest])))
    return [
        {
            "method": "gradient cosine of known pictures", "decoder": "none", "control": name, "victims": len(values),
            "auc": float(np.mean(values)), "auc_range": [min(values), max(values)],
        }
        for name, values in auc.items()
    ]  # fmt: skip
