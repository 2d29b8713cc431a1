"""Words read from weights, and gradient matching."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from bench.weight_inversion import Rows, Setting

MATCHED = 8


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
        for i, one in list(enumerate(ids))[: 2 if setting.quick else 30]:
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
    """Gradient matching on eight victims, against random latents and against another victim's weights."""
    from bench.inversion_decoders import longest
    from diffward.inversion.matching import match_gradients
    from diffward.models.mini.attributes import Person
    from diffward.models.mini.reader import load_reader

    victims = longest(setting, 2 if setting.quick else MATCHED)
    reader, denoiser = load_reader(), setting.denoiser
    zoo = setting.material.zoo

    def hits(latents: torch.Tensor, label: tuple[int, ...]) -> float:
        seen = reader.read(denoiser.decode(latents))
        return float(
            np.mean([(seen[n] == v).mean() for n, v in Person(label).attributes().items()])
        )

    found: dict[str, list[float]] = {"own": [], "other": [], "start": []}
    cosines = []
    for i, one in enumerate(victims.rows):
        other = victims.rows[i - 1]
        made = match_gradients(denoiser, zoo.lora(one), steps=5 if setting.quick else 100, seed=i)
        found["own"].append(hits(made.latents, one.label))
        found["other"].append(hits(made.latents, other.label))
        g = torch.Generator().manual_seed(i)
        found["start"].append(hits(torch.randn(made.latents.shape, generator=g), one.label))
        cosines.append((float(made.cosines[0]), float(made.cosines[-1])))
    return [
        {
            "method": "gradient matching", "decoder": "latents", "control": name, "victims": len(victims),
            "attribute_accuracy": float(np.mean(values)), "cosine_first": float(np.mean([c[0] for c in cosines])),
            "cosine_last": float(np.mean([c[1] for c in cosines])),
        }
        for name, values in found.items()
    ]  # fmt: skip
