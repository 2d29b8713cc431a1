"""Ways of interrupting a run, for tests of resuming."""

from __future__ import annotations

from diffward.finetune import METHODS

Plain = METHODS["plain"].obj


class StopAfter(Plain):
    """Interrupted within a step, in its forward pass number `passes`."""

    def __init__(self, passes):
        self.left = passes

    def loss(self, denoiser, batch):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().loss(denoiser, batch)


StopAfter.__name__ = "Plain"  # for the fingerprint it is the same method


def stop_at(step):
    """An `on_step` that interrupts after so many steps."""

    def on_step(done, *_):
        if done == step:
            raise KeyboardInterrupt

    return on_step
