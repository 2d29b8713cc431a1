"""Fitting an encoder and its heads: one loop, whatever the encoder is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffward.inversion.encoder import Heads, contrast, kl
from diffward.stage import cosine, run_stage, set_rate

if TYPE_CHECKING:
    from diffward.inversion.data import Data
    from diffward.inversion.learn import InverterSettings

Encode = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Numbers of rows (n,) and their log steps (n,), NaN where not told, to mu and log sigma^2 (n, latent)."""


def fit_encoder(
    heads: Heads, encoder: nn.Module, encode: Encode, data: Data, wanted: Tensor, settings: InverterSettings,
    work: Path, run: str,
) -> None:  # fmt: skip
    """Train `encoder`, as `encode` uses it, and the heads; resumable from `work`.

    The step is told for half of the rows, drawn anew each time. Loss: InfoNCE and squared error of the identity vector,
    cross-entropy of the attributes, squared error of log pictures and log steps, subject or none, and the KL of z.

    Args:
        wanted: standardised identity vectors (n, k).
    """
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, settings.lr, weight_decay=settings.weight_decay, foreach=True
    )
    steps = max(1, settings.epochs * len(data) // settings.batch)
    groups = torch.tensor(data.groups)

    def step(number: int) -> dict[str, float]:
        set_rate(optimizer, settings.lr * cosine(number, steps, warmup=min(100, steps // 10 + 1)))
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed * 1_000_003 + number)
            rows = torch.randint(len(data), (settings.batch,))
            log_step = data.log_steps[rows].masked_fill(torch.rand(len(rows)) < 0.5, torch.nan)
            mu, logvar = encode(rows, log_step)
            z = mu + torch.randn_like(mu) * (0.5 * logvar).exp() if settings.kl else mu
        losses = _losses(heads, z, data.of(rows.tolist()), wanted[rows], groups[rows])
        loss = torch.stack(list(losses.values())).sum()
        divergence = kl(mu, logvar, settings.free)
        optimizer.zero_grad(set_to_none=True)
        (loss + settings.kl * divergence).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        return {
            **{key: float(value.detach()) for key, value in losses.items()},
            "kl": float(divergence.detach()),
        }

    state = {"encoder": encoder, "heads": heads, "optimizer": optimizer}
    run_stage("encoder", steps, step, state, work / "encoder.pt", run=run)


def _losses(
    heads: Heads, z: Tensor, data: Data, wanted: Tensor, groups: Tensor
) -> dict[str, Tensor]:
    """Each head's mean loss; rows without a subject count for steps and the subject's head alone."""
    found, there = heads(z), data.subject > 0
    vectors, own = found["identity"][there], wanted[there]
    losses = {
        "steps": F.mse_loss(found["steps"], data.log_steps),
        "subject": F.binary_cross_entropy_with_logits(found["subject"], data.subject),
    }
    if not there.any():
        return losses
    losses |= {
        "identity": contrast(vectors, own, groups[there]).mean(),
        "vector": F.mse_loss(vectors, own),
        "pictures": F.mse_loss(found["pictures"][there], data.log_pictures[there]),
    }
    if data.labels.shape[1]:
        logits = (value[there] for name, value in found.items() if name.startswith("attribute "))
        labels = data.labels[there]
        each = [F.cross_entropy(one, labels[:, i]) for i, one in enumerate(logits)]
        losses["attributes"] = torch.stack(each).mean()
    return losses
