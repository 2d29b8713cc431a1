"""Which layers give members away, before any training: the first step's gain, member by member.

To first order a step in direction u lowers the loss of picture x by <g_x, u>, g_x the gradient of its loss. With u the
mean gradient of the members, a member's own gradient is part of u; whether that part stands out against what
all pictures gain is the AUC that a base-calibrated attack starts with. It depends on the direction
alone, so no early stopping goes below it; which weights are adapted decides it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bench._result import record
from bench.private_cases import QUICK_SIZES, Material, Sizes, people_material
from diffward.finetune.sampler import generator
from diffward.membership.bank import Pairs
from diffward.metrics.roc import auc, auc_interval
from diffward.models.adapters import TARGETS
from diffward.models.features import Features, encode_pictures
from diffward.models.load import load_base

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser

SEEDS = (0, 1, 2)
RANK, DRAWS, PAIRS = 8, 8, 16
KINDS = {
    "keys and values of the cross-attention (text)": ("attn2.to_k", "attn2.to_v"),
    "the rest of the cross-attention": ("attn2.to_q", "attn2.to_out"),
    "self-attention": ("attn1.",),
    "projections around the attention": ("proj_in", "proj_out"),
    "feed-forward": ("ff.net",),
    "convolutions": ("conv", "samplers"),
    "all": ("",),
}


def run(quick: bool = False) -> None:
    rows = []
    for seed in SEEDS[: 1 if quick else None]:
        with tempfile.TemporaryDirectory() as folder:
            sizes = QUICK_SIZES if quick else Sizes()
            rows += layers(people_material(Path(folder) / "people", seed, sizes), seed)
    rows += over_seeds(rows)
    record("leak-by-layer", rows, seeds=SEEDS, quick=quick, notes=[
        "people and split of private-lora; LoRA of rank 8 on all layers at its start (B = 0), gradients of B",
        f"direction: of the members' mean gradient ({DRAWS} draws of t and noise each), or its signs (AdamW's first step)",
        f"auc: of the first-order gain under {PAIRS} other fixed draws, 120 judged members against 120 judged non-members",
        "gain: mean first-order gain of the non-members for a step of length one, in units of that of the mean "
        "gradient of all layers; excess: the members' mean gain over the non-members'",
    ])  # fmt: skip


def layers(material: Material, seed: int) -> list[dict[str, Any]]:
    """A row a kind of layer and direction."""
    denoiser = load_base("mini", device="cpu")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapter = denoiser.inject(RANK, RANK, TARGETS["all"], text_encoder=False)
    factors = {name: layer.lora_B["default"].weight for name, layer in adapter.layers().items()}
    for layer in adapter.layers().values():
        layer.lora_A["default"].weight.requires_grad_(False)
    sides = material.sides
    learnt = gradients(
        denoiser, encode_pictures(denoiser, material.training), list(factors.values()), seed
    )
    members, others = (
        gradients(denoiser, encode_pictures(denoiser, side), list(factors.values()), None)
        for side in (sides.members, sides.non_members)
    )
    direction = learnt.mean(axis=0)
    whole = float((others @ direction).mean() / np.linalg.norm(direction))
    kind = np.repeat(list(factors), [b.numel() for b in factors.values()])
    rows = []
    for what, parts in KINDS.items():
        inside = np.array([any(part in name for part in parts) for name in kind])
        for way, u in (("mean", direction * inside), ("signs", np.sign(direction) * inside)):
            gained, base = members @ u, others @ u
            low, high = auc_interval(gained, base)
            rows.append({
                "seed": seed, "layers": what, "direction": way, "parameters": int(inside.sum()),
                "auc": auc(gained, base), "auc_ci95": [low, high],
                "gain": float(base.mean() / np.linalg.norm(u)) / whole, "excess": float(gained.mean() / base.mean()),
            })  # fmt: skip
    return rows


def gradients(
    denoiser: Denoiser, features: Features, factors: list[torch.nn.Parameter], seed: int | None
) -> np.ndarray:
    """Gradient (n, P) of each picture's mean error; under draws of its own, or fixed pairs where seed is None."""
    pairs, found = Pairs.draw(denoiser, PAIRS), []
    steps = denoiser.schedule.config.num_train_timesteps
    for row in range(len(features)):
        t, eps = pairs.t, pairs.eps
        if seed is not None:
            own = generator(seed, row, 40)
            t = torch.randint(steps, (DRAWS,), generator=own)
            eps = torch.randn((DRAWS, *denoiser.latent_shape), generator=own)
        rows = torch.full((len(t),), row)
        errors = denoiser.errors(features.latents[rows], t, eps, features.conditioning(rows))
        parts = torch.autograd.grad(errors.mean(), factors)
        found.append(torch.cat([part.flatten() for part in parts]).numpy())
    return np.stack(found).astype(np.float64)


def over_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean over the seeds, with the spread of the AUC."""
    means = []
    for what in KINDS:
        for way in ("mean", "signs"):
            alike = [r for r in rows if (r["layers"], r["direction"]) == (what, way)]
            if len(alike) > 1:
                each = [r["auc"] for r in alike]
                means.append({
                    **alike[0], "seed": "all", "auc": float(np.mean(each)), "auc_ci95": [min(each), max(each)],
                    **{key: float(np.mean([r[key] for r in alike])) for key in ("gain", "excess")},
                })  # fmt: skip
    return means
