"""An update of the mask (its step and 4 of the user): ours, and the published loop that encodes in every step.

Same UNet with the block layout of SD 1.5 at a tenth of its widths (686 tensors, 8.6M parameters), same
pictures, batch 16, fp32, one thread, in turns in one process. The autoencoder is as wide as makes its share of
the published step the 7 to 8 % that were measured of the public code (27 % at full size).

Copies of the weights at the peak are counted: `Ledger` follows every storage that an operation makes during an
update, in forward, backward and hooks alike. A storage counts as weights if it was there before and
belongs to them (theta; theta_ft or d; the optimizer's state), if it has the shape of a parameter (gradients), or if it
was made where weights are updated, whatever its shape. That is done on 5 pictures of either domain, as no side
of an activation's shape then is that of a weight; what belongs to weights does not depend on the batch. Scratch inside a
single operation is not seen. theta_pre of ours lies in a file that the system maps: it is left out here, and
looked at apart by how much of the mapping the process made its own.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench._published_mask import PublishedMask
from bench._result import record
from bench._support import draw_folder, interleaved

if TYPE_CHECKING:
    from torch import Tensor

    from diffward.data import Pictures
    from diffward.models.denoiser import Denoiser
    from diffward.guard.subject import Subject
    from diffward.models.features import Features

SEED = 0
BATCH, COUNTED = 16, 10  # pictures in a step: where it is timed, where memory is counted
PICTURES = 32  # of each domain
RESOLUTION = 64  # pixels
OPTIMIZERS = ("factored", "adamw")
TENSORS, PARAMETERS = 686, 8_605_284


def run(quick: bool = False) -> None:
    rounds = 2 if quick else 9
    rows = [row for factor in ((8,) if quick else (8, 4)) for row in compare(factor, rounds)]
    record("mask-speed", rows, seeds=[SEED], quick=quick, notes=[
        "an update of the mask: published: 1 mask step and 4 steps of the user on batches of 16, VAE and text encoder in "
        "each, gradient checkpointing, plain SGD; ours: 4 steps of the user, each read for the mask, on half batches of "
        "8 and 8, latents and embeddings encoded once",
        "latent: side of the latents of 64-pixel pictures, 8 with an autoencoder that shrinks by 8 as SD's does",
        "seconds: processor time of the one thread, so that what else the machine does counts little; medians of rounds in "
        "turns; hooks_s: what of ours_s goes into reading and moving weights; time_ratio: median over the rounds of "
        "published / ours, time_ratio_range: smallest and largest",
        "copies_at_peak: storages that are weights or made of them, in units of the UNet's fp32 bytes, counted as the "
        "module's text says; published_copies: the same of the published loop; base_private: what of theta_pre, which "
        "lies in a mapped file, became private memory, in the same units",
    ])  # fmt: skip


def compare(factor: int, rounds: int) -> list[dict[str, Any]]:
    """One row a user's optimizer, latents of 64 / `factor`."""
    with tempfile.TemporaryDirectory() as name, one_thread():
        pictures = drawn(Path(name))
        theirs, *ours = _ways(factor, pictures, BATCH)
        there, *here = interleaved(rounds, theirs.seconds, *(way.seconds for way in ours))
        counted = [way.copies() for way in _ways(factor, pictures, COUNTED)]
        rows = []
        for way, seconds, copies in zip(ours, here, counted[1:], strict=True):
            assert isinstance(way, Ours)
            ratios = [b / a for a, b in zip(seconds, there, strict=True)]
            rows.append({
                "user_optimizer": way.optimizer, "latent": RESOLUTION // factor, "tensors": TENSORS,
                "parameters": PARAMETERS, "batch": BATCH, "updates": rounds, "ours_s": median(seconds),
                "hooks_s": way.hooks / way.done, "published_s": median(there), "time_ratio": median(ratios),
                "time_ratio_range": [min(ratios), max(ratios)], "copies_at_peak": copies,
                "published_copies": counted[0], "base_private": way.base_private(),
            })  # fmt: skip
    return rows


def _ways(factor: int, pictures: Pictures, batch: int) -> list[Way]:
    """The published loop, then ours with each optimizer; each has made one update, so that all is warm."""
    ours = [Ours(factor, pictures, optimizer, batch) for optimizer in OPTIMIZERS]
    ways = [Published(factor, pictures, ours[0].subject.tuned, batch), *ours]
    for way in ways:
        way.update()
    return ways


class Way:
    """One of the two loops."""

    ledger: Ledger | None = None

    def update(self) -> None:
        """Make one update of the mask."""
        raise NotImplementedError

    def weights(self) -> tuple[list[Tensor], list[Tensor]]:
        """The UNet's parameters, and all that stays between updates and belongs to weights, they included."""
        raise NotImplementedError

    def ranges(self) -> list[range]:
        """Addresses of weights that lie in a file."""
        return []

    def seconds(self) -> float:
        """Processor seconds of an update."""
        began = time.process_time()
        self.update()
        return time.process_time() - began

    def copies(self) -> float:
        """Of the weights, at the peak of an update."""
        self.ledger = Ledger(*self.weights(), self.ranges())
        with self.ledger:
            self.update()
        found, self.ledger = self.ledger.copies, None
        return found

    def updating(self) -> contextlib.AbstractContextManager[None]:
        """Around what is done to weights."""
        return self.ledger.updating() if self.ledger else contextlib.nullcontext()


class Ours(Way):
    """`guard learn`'s loop.

    Attributes:
        hooks: processor seconds that its hooks took, of `done` updates.
    """

    def __init__(self, factor: int, pictures: Pictures, optimizer: str, batch: int) -> None:
        from diffward.guard.bilevel import Simulation
        from diffward.guard.effective import Effective
        from diffward.guard.settings import GuardSettings
        from diffward.guard.subject import Subject
        from diffward.guard.user import make_optimizer

        self.optimizer, self.done, self.hooks = optimizer, 0, 0.0
        denoiser = small_denoiser(factor)
        settings = GuardSettings(
            tune_steps=1, interval=4, batch=batch, user_optimizer=optimizer, seed=SEED
        )
        self.subject = Subject(denoiser, *domains(denoiser, pictures), settings)
        base, tuned = self.subject.base, self.subject.tuned
        self.upper = upper_of(self.subject)
        self.effective = Effective(
            denoiser.unet, base, tuned, self.upper.mask(), make_optimizer(optimizer), settings.user_lr
        )  # fmt: skip
        self.simulation = Simulation(self.subject, self.effective)
        self._watch_hooks()
        self.effective.__enter__()

    def update(self) -> None:
        from diffward.guard.bilevel import _one_update

        _one_update(self.simulation, self.upper, self.done)
        self.effective.set_mask(self.upper.mask())
        self.done += 1

    def weights(self) -> tuple[list[Tensor], list[Tensor]]:
        own = list(self.effective.parameters.values())
        state = [t for t in tree_leaves(self.effective.user.state()) if isinstance(t, torch.Tensor)]
        return own, [*own, *self.effective.tuned.values(), *state]

    def ranges(self) -> list[range]:
        return [part for part, _ in mappings(self.subject.base.path)]

    def base_private(self) -> float | None:
        """What of theta_pre's mapping is this process's own, in copies of the weights; None where not told."""
        found = mappings(self.subject.base.path)
        size = sum(p.nbytes for p in self.effective.parameters.values())
        return sum(own for _, own in found) / size if found else None

    def _watch_hooks(self) -> None:
        make = self.effective._arrives

        def arrives(name: str, index: int) -> Callable[[torch.nn.Parameter], None]:
            hook = make(name, index)

            def watched(parameter: torch.nn.Parameter) -> None:
                began = time.process_time()
                with self.updating():
                    hook(parameter)
                self.hooks += time.process_time() - began

            return watched

        self.effective._arrives = arrives  # type: ignore[method-assign]


class Published(Way):
    """The published loop."""

    def __init__(
        self, factor: int, pictures: Pictures, tuned: Mapping[str, Tensor], batch: int
    ) -> None:
        self.loop = PublishedMask(
            small_denoiser(factor), pictures.pixels(RESOLUTION), pictures.captions,
            torch.arange(len(pictures)) < len(pictures) // 2, tuned, batch=batch, seed=SEED, updating=self.updating,
        )  # fmt: skip

    def update(self) -> None:
        self.loop()

    def weights(self) -> tuple[list[Tensor], list[Tensor]]:
        own = list(self.loop.unet.parameters())
        return own, [*own, *self.loop.d]


def upper_of(subject: Subject) -> Any:
    """The upper level of `guard learn`; what fine-tuning gains says nothing on random weights and is left out."""
    from diffward.guard.freeze import Budgeted

    return Budgeted(subject.settings, subject.costs, (1.0, 1.0))


class Ledger(TorchDispatchMode):
    """Bytes of weights and of what is made of them: now, and at the most since it was opened.

    Args:
        parameters: whose shapes count, also transposed and as matrices of one row an output.
        held: what is there before and counts.
        ranges: addresses that do not: mapped files.
    """

    def __init__(
        self, parameters: Iterable[Tensor], held: Iterable[Tensor], ranges: Iterable[range] = ()
    ) -> None:
        super().__init__()
        parameters = list(parameters)
        self.size = sum(p.nbytes for p in parameters)
        self.now = self.peak = 0
        self._ranges, self._marked = list(ranges), False
        self._known: dict[int, tuple[int, Any]] = {}
        self._shapes = {
            shape for p in parameters
            for shape in (tuple(p.shape), tuple(p.shape)[::-1], (len(p), p.numel() // len(p)))
        }  # fmt: skip
        for tensor in held:
            self._enter(tensor)

    @property
    def copies(self) -> float:
        """The peak, in copies of the weights."""
        return self.peak / self.size

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """Whatever is made within counts."""
        self._marked = True
        try:
            yield
        finally:
            self._marked = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (self._marked or tuple(tensor.shape) in self._shapes):  # fmt: skip
                self._enter(tensor)
        return made

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, address = storage._cdata, storage.data_ptr()
        if key in self._known or any(address in part for part in self._ranges):
            return
        self._known[key] = storage.nbytes(), weakref.ref(storage, lambda _: self._leave(key))
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _leave(self, key: int) -> None:
        size, _ = self._known.pop(key)
        self.now -= size


def mappings(path: Path) -> list[tuple[range, int]]:
    """Where this process maps a file, and the bytes of each mapping that became its own; none but on Linux."""
    told = Path("/proc/self/smaps")
    found: list[tuple[range, int]] = []
    inside = False
    for line in told.read_text().splitlines() if told.exists() else []:
        first, *rest = line.split()
        if not first.endswith(":"):
            inside = bool(rest) and rest[-1] == str(path.resolve())
            if inside:
                low, high = (int(end, 16) for end in first.split("-"))
                found.append((range(low, high), 0))
        elif inside and first == "Anonymous:":
            found[-1] = found[-1][0], int(rest[0]) * 1024
    return found


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def drawn(folder: Path) -> Pictures:
    """Pictures of both domains, the forbidden first."""
    from diffward.data import load_pictures

    return load_pictures(draw_folder(folder / "drawn", 2 * PICTURES, [SEED, 31], size=RESOLUTION))


def domains(denoiser: Denoiser, pictures: Pictures) -> tuple[Features, Features]:
    from diffward.models.features import encode_pictures

    features = encode_pictures(denoiser, pictures, cache=False)
    half = len(pictures) // 2
    return features.of(range(half)), features.of(range(half, len(pictures)))


def small_denoiser(factor: int = 4) -> Denoiser:
    """SD 1.5's blocks at a tenth of their widths, random weights; the VAE shrinks by `factor`, 4 or 8."""
    from diffusers import (
        AutoencoderKL,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    from bench.make_sd15 import _new_tokenizer
    from diffward.models.denoiser import Denoiser

    torch.manual_seed(SEED)
    tokenizer, width = _new_tokenizer(), 64
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // factor,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        cross_attention_dim=width,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    found = len(list(unet.parameters())), sum(p.numel() for p in unet.parameters())
    assert found == (TENSORS, PARAMETERS), f"{found[0]} tensors, {found[1]:,} parameters"
    channels = (20, 40, 80) if factor == 4 else (12, 24, 48, 48)
    vae = AutoencoderKL(
        sample_size=RESOLUTION,
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.18215,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, projection_dim=width, intermediate_size=4 * width,
            num_hidden_layers=6, num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length,
            hidden_act="quick_gelu", bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1,
            pad_token_id=len(tokenizer) - 1,
        )
    )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        skip_prk_steps=True, set_alpha_to_one=False,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return Denoiser(pipeline, "sd15 layout, a tenth of the widths", resolution=RESOLUTION)
