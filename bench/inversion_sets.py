"""Whether weights say more than who it is: a set of vectors for single pictures, and what is particular to the training pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bench.weight_inversion import Rows, Setting
    from diffward.inversion.data import Data

OTHERS = 3  # stream of as many other pictures of the same subject


def sets(setting: Setting) -> Rows:
    """The set head against one vector for all, and ridge on the mean of the training pictures less the subject's."""
    from diffward.inversion.sets import picture_vectors

    material, inverter = setting.material, setting.inverter
    data = material.test.join(material.valid).last()
    reading = inverter.read(data.tokens)
    own, others = (
        inverter.standard_identity(
            picture_vectors(material.subjects, data.rows, material.eye, material.space, stream)
        )
        for stream in (1, OTHERS)
    )
    one = reading.identity[:, None]
    assert reading.picture_set.shape[1], "an inverter without a set head"
    repeated = one.expand_as(reading.picture_set)
    some = torch.tensor([row.recipe["pictures"] >= 4 for row in data.rows])
    rows: Rows = []
    for name, among in (
        ("", torch.ones(len(data), dtype=torch.bool)),
        (", four pictures and more", some),
    ):
        if among.sum() < 2:
            continue
        for control, found in (
            ("own", reading.picture_set), ("one vector for all", repeated), ("other", reading.picture_set.roll(1, 0)),
        ):  # fmt: skip
            row = _row(f"picture set{name}", control, found[among], own[among], others[among])
            if control == "own":
                row |= _better(found[among], repeated[among], own[among])
            rows.append(row)
    return [*rows, _particular(setting, data, own)]


def _row(method: str, control: str, found: Tensor, own: Tensor, others: Tensor) -> dict[str, Any]:
    """Distances to the training pictures and to others of the same subject; AUC of telling the two apart by nearness,
    the mean over victims."""
    from diffward.inversion.sets import chamfer

    near, rest = (torch.cdist(found, some).min(1).values for some in (own, others))
    # Of each pair of a training picture and another: 1 where the training picture is nearer. NaN where there is none.
    won = (near[:, :, None] < rest[:, None]).float() + 0.5 * (near[:, :, None] == rest[:, None])
    won[~(near[:, :, None].isfinite() & rest[:, None].isfinite())] = torch.nan
    each = won.flatten(1).nanmean(1)
    auc, half = float(each.mean()), 1.96 * float(each.std()) / len(each) ** 0.5
    return {
        "method": method, "decoder": "set", "control": control, "victims": len(found),
        "set_distance": float(chamfer(found, own).mean()), "set_distance_others": float(chamfer(found, others).mean()),
        "picture_auc": auc, "picture_auc_ci95": [auc - half, auc + half],
    }  # fmt: skip


def _better(found: Tensor, repeated: Tensor, own: Tensor) -> dict[str, Any]:
    """How much nearer a set is to the training pictures than one vector for all, victim by victim."""
    from diffward.inversion.sets import chamfer

    gain = chamfer(repeated, own) - chamfer(found, own)
    half = 1.96 * float(gain.std()) / len(gain) ** 0.5
    return {"set_gain": float(gain.mean()), "set_gain_ci95": [float(gain.mean()) - half, float(gain.mean()) + half]}  # fmt: skip


def _particular(setting: Setting, data: Data, own: Tensor) -> dict[str, Any]:
    """Ridge from all cores on what the training pictures' mean has beyond the subject: cosine with the truth."""
    from diffward.inversion.floor import Floor
    from diffward.inversion.sets import picture_vectors

    material, inverter = setting.material, setting.inverter
    train = material.train.last()
    known = inverter.standard_identity(
        picture_vectors(material.subjects, train.rows, material.eye, material.space)
    )
    beyond = known.nanmean(1) - inverter.standard_identity(train.identity)
    floor, _ = Floor.fit(train.tokens.cores, beyond, train.groups)
    truth = own.nanmean(1) - inverter.standard_identity(data.identity)
    found = floor(data.tokens.cores)
    among = [torch.cosine_similarity(found, t, dim=1) for t in (truth, truth.roll(1, 0))]
    return {
        "method": "ridge on what is particular to the training pictures", "decoder": "set", "control": "own",
        "victims": len(data), "cosine": float(among[0].mean()), "cosine_other": float(among[1].mean()),
        "cosine_error": float(among[0].std() / len(data) ** 0.5),
    }  # fmt: skip
