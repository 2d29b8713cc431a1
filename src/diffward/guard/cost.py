"""What training each tensor costs: counted, not timed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffward.models.parameters import parameters_of

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser

# An AdamW step reads weight, gradient and two moments and writes three of them; a byte moved costs about
# as much as so many multiply-adds.
_OPTIMIZER = 28


@torch.no_grad()
def training_costs(denoiser: Denoiser) -> Tensor:
    """(N,): multiply-adds of each tensor's weight gradient for one picture, and its part of the optimizer step.

    How often a weight is used is seen in one forward pass.
    """
    uses: dict[str, int] = {}
    modules = dict(denoiser.unet.named_modules())

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(module, nn.Conv2d):
                uses[name] = output.shape[-1] * output.shape[-2]
            elif isinstance(module, nn.Linear):
                uses[name] = output.numel() // output.shape[-1]
            else:
                uses[name] = output.numel() // module.weight.numel()  # type: ignore[union-attr,operator]

        return hook

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in modules.items()
        if getattr(module, "weight", None) is not None
    ]
    device = denoiser.device
    latents = torch.zeros(1, *denoiser.latent_shape, device=device)
    width = denoiser.unet.config.cross_attention_dim
    length = denoiser.tokenizer.model_max_length
    try:
        denoiser.predict(
            latents, torch.zeros(1, dtype=torch.long, device=device), torch.zeros(1, length, width, device=device)
        )  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()
    return torch.tensor(
        [
            p.numel() * (uses.get(name.rpartition(".")[0], 1) + _OPTIMIZER)
            for name, p in parameters_of(denoiser.unet).items()
        ],
        dtype=torch.float64,
    )
