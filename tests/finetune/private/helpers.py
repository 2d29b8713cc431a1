"""What the tests of the private methods share: pictures, a started method, its pieces computed apart."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from diffward.finetune import METHODS, Settings
from diffward.finetune.loop import _trainable
from diffward.finetune.method import Batch, Run
from diffward.finetune.settings import GaugeOptions, Privacy

QUICK = Settings(
    steps=10, batch=4, rank=2, lr=1e-2, seed=5, gauge=GaugeOptions(pictures=4, pairs=2)
)
OURS = ("mp", "smp", "hinge", "dual", "moment")
ATTACKED = ("mp", "smp", "hinge", "dual")


def make(name):
    return METHODS[name].obj()


def started(denoiser, features, auxiliary, name, **options):
    """A method at the start of a run whose LoRA has moved and whose attacker knows something."""
    changes = {k: options.pop(k) for k in list(options) if k in ("batch", "tune", "text_encoder")}
    settings = replace(QUICK, privacy=Privacy(**options), **changes)
    method, parameters = make(name), _trainable(denoiser, settings)
    run = Run(denoiser, features, settings, parameters, list(range(10)), 10, auxiliary)
    method.start(run)
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.1 * torch.randn(p.shape, generator=random))
        if hasattr(method, "opponent"):
            for p in method.opponent.attacker.parameters():
                p.add_(0.2 * torch.randn(p.shape, generator=random))
    return method, run


def batch_of(features, rows, seed=0):
    random, rows = torch.Generator().manual_seed(seed), torch.tensor(rows)
    t = torch.randint(1000, rows.shape, generator=random)
    eps = torch.randn(features.latents[rows].shape, generator=random)
    return Batch(features.latents[rows], features.conditioning(rows), t, eps, rows)


def flat(loss, run):
    slopes = torch.autograd.grad(loss, run.parameters, retain_graph=True)
    return torch.cat([slope.flatten() for slope in slopes])


def make_it_know(method, run, batch):
    """Shift the attacker until it takes all of a batch for members."""
    least = min(
        math.log(1 / math.expm1(pieces(method, run, batch, i)[2])) for i in range(len(batch.t))
    )
    method.opponent.attacker.layers[-1].bias.data += 0.2 - least


def pieces(method, run, batch, i):
    """(L, grad L, CE, grad CE) of one sample, each by its own passes."""
    denoiser, attacker = run.denoiser, method.opponent.attacker
    one = [x[i : i + 1] for x in (batch.latents, batch.t, batch.eps, batch.conditioning)]
    loss = denoiser.errors(*one).mean()
    with torch.no_grad(), denoiser.adapter(False):
        base = denoiser.errors(*one)
    logit = attacker(denoiser.errors(*one), base, one[1])
    ce = binary_cross_entropy_with_logits(logit, torch.ones(1))
    return loss.detach(), flat(loss, run), ce.detach(), flat(ce, run)
