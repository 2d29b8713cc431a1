"""The sample grid of a run: the same prompts and seeds before, during and after."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from diffward.files import atomic_path
from diffward.finetune.settings import Settings
from diffward.models.sampling import sample

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser


class SampleGrid:
    """One row of pictures a drawn step, one column a prompt, in `samples.png`."""

    def __init__(
        self, denoiser: Denoiser, prompts: list[str], settings: Settings, out: Path
    ) -> None:
        self.denoiser, self.prompts, self.settings = denoiser, prompts, settings
        self.rows, self.file = out / "samples", out / "samples.png"

    def clear(self) -> None:
        """Forget the rows of an earlier run in this folder."""
        for path in self.rows.glob("step_*.png"):
            path.unlink()

    def after_step(self, step: int) -> None:
        every = self.settings.sample_every
        if self.prompts and (step == 0 or (every and step % every == 0)):
            self._draw(step)

    def finish(self, step: int) -> None:
        if not self.prompts:
            return
        self._draw(step)
        rows = [np.asarray(Image.open(path)) for path in sorted(self.rows.glob("step_*.png"))]
        # A resumed run may have been given other prompts: only rows as wide as the last fit.
        _save(np.concatenate([r for r in rows if r.shape == rows[-1].shape]), self.file)

    def _draw(self, step: int) -> None:
        path = self.rows / f"step_{step:07d}.png"
        if not path.exists():
            pictures = sample(self.denoiser, self.prompts, seed=self.settings.seed)
            _save(np.concatenate(list(pictures), axis=1), path)


def _save(pixels: np.ndarray, path: Path) -> None:
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary)
