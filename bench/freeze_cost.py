"""What fine-tuning under a mask costs: FreezeAsGuard's Table 3 on the architecture of SD 1.5, random weights.

Each configuration is a process of its own, `python -m bench.freeze_cost train BASE RHO BY MASK`: full
fine-tuning (AdamW, fp32) by `diffward.finetune.train` with the mask's tensors frozen. At small latents weights and
moments are all of the memory; `sd15-512` is the same at 512 pixels, where activations count. Masks:

    random   as in the paper's table
    costly   the tensors whose training costs most (guard.cost)
    early    the first in the order in which a forward pass uses them, so that the backward pass ends early

and `python -m bench.freeze_cost learn BASE FOLDER`: theta_ft and one update of the mask, for what learning needs.
`python -m bench.freeze_cost large` measures `sd15-512` alone; rows of the recorded table stay.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from bench._result import record, with_recorded
from bench._support import measure

if TYPE_CHECKING:
    from torch import Tensor

    from diffward.models.denoiser import Denoiser
    from diffward.models.features import Features

SEED, LR = 0, 1e-5
SD15, LARGE, SMALL = "sd15", "sd15-512", "small"
OPTIMIZER = "factored"  # of the simulated user
MASKS = "random", "costly", "early"
WARM, STEPS = 1, 2
LATENT, BATCH = {SD15: 16, LARGE: 64, SMALL: 8}, 2
LIMIT_MB = 24 * 2**30 / 1e6


@dataclass(frozen=True)
class Case:
    """A mask: the share it freezes, what the share counts (tensors, parameters, cost), and how it chooses."""

    rho: float
    by: str = "tensors"
    mask: str = "random"


FREE = Case(0.0, mask="none")
CASES = (
    *(Case(rho) for rho in (0.3, 0.01, 0.05, 0.1, 0.2, 0.4, 0.8)),
    *(
        Case(0.3, by, mask)
        for by in ("tensors", "parameters", "cost")
        for mask in ("costly", "early")
    ),
)
AT_512 = Case(0.3), *(Case(0.3, "parameters", mask) for mask in MASKS[1:])
QUICK = tuple(Case(0.3, mask=mask) for mask in MASKS)


def run(quick: bool = False) -> None:
    base = SMALL if quick else SD15
    write([
        *table(base, QUICK if quick else CASES),
        *([] if quick else table(LARGE, AT_512)),
        *learning(base),
    ], quick)  # fmt: skip


def write(rows: list[dict[str, Any]], quick: bool = False) -> None:
    base = SMALL if quick else SD15
    if not quick:
        rows = with_recorded("freeze-cost", rows, ("base", "rho", "by", "mask", "learn", "stage"))
    record("freeze-cost", rows, seeds=[SEED], quick=quick, notes=[
        f"full fine-tuning, AdamW, fp32, one thread, batch {BATCH}, latents {LATENT[base]} x {LATENT[base]} "
        f"({LARGE}: {LATENT[LARGE]} x {LATENT[LARGE]}), random weights; each row a process of its own, "
        f"{STEPS} steps after {WARM} that is not counted",
        "rho: share frozen, of what `by` says (cost: of what training all tensors costs); mask: random; costly: "
        "the tensors whose training costs most; early: the first that a forward pass uses; tensor_share, parameter_share: "
        "what is frozen",
        "memory_mb: peak resident memory of the process, interpreter, autoencoder and text encoder included; seconds: "
        "processor seconds of a step; ratios: to rho = 0, which is measured first and last and averaged",
        "learn: the simulated user's optimizer; theta_ft and one update of the mask with interval 1. tune: the process "
        "that also makes theta_ft; update: the one that finds it made. private_mb: the most anonymous memory (sampled): "
        "what remains when the system drops the pages of theta_pre's file; its seconds include writing the checkpoint",
    ])  # fmt: skip


def table(base: str, cases: tuple[Case, ...]) -> list[dict[str, Any]]:
    """A row a case, that without a mask first."""
    free = [train_row(base, FREE)]
    rows = [train_row(base, case) for case in cases]
    free.append(train_row(base, FREE))
    whole = free[0] | {key: mean(row[key] for row in free) for key in ("memory_mb", "seconds")}
    for row in (whole, *rows):
        row["memory_ratio"] = row["memory_mb"] / whole["memory_mb"]
        row["time_ratio"] = row["seconds"] / whole["seconds"]
    return [whole, *rows]


def train_row(base: str, case: Case) -> dict[str, Any]:
    row = {"base": base, "rho": case.rho, "by": case.by, "mask": case.mask}
    return row | _alone("train", base, case.rho, case.by, case.mask)


def learning(base: str) -> list[dict[str, Any]]:
    """What making theta_ft and an update of the mask take, and the update alone."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for stage in ("tune", "update"):
            found = _alone("learn", base, name)
            fits = {"fits_24_gib": found["memory_mb"] <= LIMIT_MB}
            rows.append({"base": base, "learn": OPTIMIZER, "stage": stage, **found, **fits})
            (Path(name) / "learning.pt").unlink()  # or the second process would find all done
    return rows


def _alone(*arguments: str | float) -> dict[str, Any]:
    """What a process of its own tells, and its peak memory."""
    done = measure([sys.executable, "-m", "bench.freeze_cost", *map(str, arguments)])
    found = {**json.loads(done.output.splitlines()[-1]), "memory_mb": done.peak_mb}
    print(*arguments, {key: round(value, 3) for key, value in found.items()}, flush=True)
    return found


# --- in a process of its own ---------------------------------------------------------------------


def train_alone(base: str, case: Case) -> dict[str, float]:
    """Some steps under a mask; gives what is frozen and the processor seconds of a step."""
    from diffward.finetune import Settings, train
    from diffward.finetune.plain import Plain
    from diffward.guard.budget import share_of
    from diffward.models.parameters import parameters_of

    denoiser = denoiser_of(base)
    own = parameters_of(denoiser.unet)
    chosen = frozen_by(case, denoiser)
    names = [name for name, one in zip(own, chosen.tolist(), strict=True) if one]
    stamps: list[float] = []
    settings = Settings(steps=WARM + STEPS, batch=BATCH, lr=LR, tune="full", seed=SEED)
    train(
        denoiser, pictures_of(denoiser, 2 * BATCH), Plain(), settings, frozen=names,
        on_step=lambda step: stamps.append(time.process_time()),
    )  # fmt: skip
    sizes = [float(p.numel()) for p in own.values()]
    return {
        "tensor_share": len(names) / len(own),
        "parameter_share": share_of(chosen, sizes),
        "seconds": mean(b - a for a, b in itertools.pairwise(stamps[WARM:])),
    }


def frozen_by(case: Case, denoiser: Denoiser) -> Tensor:
    """bool (N,): the tensors that a mask freezes."""
    import torch

    from diffward.guard.budget import choose
    from diffward.guard.cost import training_costs
    from diffward.models.parameters import parameters_of

    own = parameters_of(denoiser.unet)
    if not case.rho:
        return torch.zeros(len(own), dtype=torch.bool)
    scores: dict[str, Callable[[], Tensor]] = {
        "random": lambda: torch.rand(len(own), generator=torch.Generator().manual_seed(SEED)),
        "costly": lambda: training_costs(denoiser),
        "early": lambda: -order_of_use(denoiser).double(),
    }
    costs: dict[str, Callable[[], Tensor]] = {
        "tensors": lambda: torch.ones(len(own)),
        "parameters": lambda: torch.tensor([float(p.numel()) for p in own.values()]),
        "cost": lambda: training_costs(denoiser),
    }
    return choose(scores[case.mask](), costs[case.by](), case.rho)


def order_of_use(denoiser: Denoiser) -> Tensor:
    """(N,): the place at which a forward pass first uses each parameter's module; all of a module's alike."""
    import torch

    from diffward.models.parameters import parameters_of

    places: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            places.setdefault(name, len(places))

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name))
        for name, module in denoiser.unet.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    try:
        one = pictures_of(denoiser, 1)
        with torch.no_grad():
            denoiser.predict(one.latents, torch.zeros(1, dtype=torch.long), one.conditioning(torch.zeros(1, dtype=torch.long)))  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()
    return torch.tensor([places[name.rpartition(".")[0]] for name in parameters_of(denoiser.unet)])


def learn_alone(base: str, folder: Path) -> dict[str, float]:
    """theta_ft (unless the folder has it) and one update; gives the seconds of both and the most private memory."""
    from bench.mask_speed import upper_of
    from diffward.guard.bilevel import run_bilevel
    from diffward.guard.settings import GuardSettings
    from diffward.guard.subject import Subject

    denoiser = denoiser_of(base)
    settings = GuardSettings(
        tune_steps=1, updates=1, interval=1, batch=BATCH, user_lr=LR, user_optimizer=OPTIMIZER, seed=SEED
    )  # fmt: skip
    illegal, innocent = (pictures_of(denoiser, BATCH, SEED + i) for i in (1, 2))
    subject = Subject(denoiser, illegal, innocent, settings, folder)
    with most_private() as most:
        began = time.process_time()
        subject.base, subject.tuned  # noqa: B018
        tuned = time.process_time()
        run_bilevel(subject, upper_of(subject))
        done = time.process_time()
    return {"tune_s": tuned - began, "seconds": done - tuned, "private_mb": most[0] / 1e6}


@contextmanager
def most_private() -> Iterator[list[float]]:
    """The most anonymous resident memory in the block, bytes, looked at ten times a second; 0 but on Linux."""
    most, ended, told = [0.0], threading.Event(), Path("/proc/self/status")

    def look() -> None:
        for line in told.read_text().splitlines() if told.exists() else []:
            if line.startswith("RssAnon:"):
                most[0] = max(most[0], float(line.split()[1]) * 1024)

    def watch() -> None:
        while not ended.wait(0.1):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()
        look()


def denoiser_of(base: str) -> Denoiser:
    from diffward.models.denoiser import Denoiser

    if base == SMALL:
        from bench._small_sd15 import small_denoiser

        return small_denoiser(seed=SEED)
    from bench.make_sd15 import new_pipeline

    return Denoiser(new_pipeline(seed=SEED), base, resolution=8 * LATENT[base])


def pictures_of(denoiser: Denoiser, count: int, seed: int = SEED) -> Features:
    """As good as encoded pictures here: noise for latents and embeddings."""
    import torch

    from diffward.models.features import Features

    g = torch.Generator().manual_seed(seed)
    length, width = denoiser.tokenizer.model_max_length, denoiser.unet.config.cross_attention_dim
    names = [f"{seed}-{i}" for i in range(count)]
    return Features(
        torch.randn(count, *denoiser.latent_shape, generator=g), names, names,
        torch.randn(count, length, width, generator=g), torch.arange(count),
    )  # fmt: skip


def main() -> None:
    import torch

    parser = argparse.ArgumentParser()
    ways = parser.add_subparsers(dest="way", required=True)
    training, learn = ways.add_parser("train"), ways.add_parser("learn")
    for one in (training, learn):
        one.add_argument("base", choices=list(LATENT))
    training.add_argument("rho", type=float)
    training.add_argument("by", choices=["tensors", "parameters", "cost"])
    training.add_argument("mask", choices=["none", *MASKS])
    learn.add_argument("folder", type=Path)
    ways.add_parser("large")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.way == "large":
        write(table(LARGE, AT_512))
    elif args.way == "train":
        print(json.dumps(train_alone(args.base, Case(args.rho, args.by, args.mask))))
    else:
        print(json.dumps(learn_alone(args.base, args.folder)))


if __name__ == "__main__":
    main()
