"""The seam everything stands on: one base model behind the same few verbs.

Every verb works on batches and returns per-sample results; nothing here averages over pictures.
Stable Diffusion 1.x and 2.x (epsilon and v-prediction), and any model built like them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffward.errors import InputError
from diffward.files import atomic_folder
from diffward.models.adapters import Adapter, MergedAdapter, PeftAdapter, SwappedWeights

if TYPE_CHECKING:
    from diffward.lora import LoraWeights

_SMALL = 1024  # places of a latent whose attention matrices fit anywhere


class Denoiser:
    """A latent diffusion model: encoder, text encoder, noise schedule and UNet.

    Attributes:
        name: what the user called the base.
        resolution: side in pixels of the pictures it works on, a multiple of `factor`.
        prediction_type: "epsilon" or "v_prediction".
        evaluations: how many picture-sized passes through the UNet were made so far.
    """

    def __init__(
        self, pipeline: Any, name: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32,
        resolution: int | None = None,
    ) -> None:  # fmt: skip
        from diffusers import DDPMScheduler

        self.name = name
        self.device = torch.device(device)
        self.compute_dtype = dtype
        self.vae = pipeline.vae.to(self.device).eval().requires_grad_(False)
        self.unet = pipeline.unet.to(self.device).eval().requires_grad_(False)
        self.text_encoder = pipeline.text_encoder.to(self.device).eval().requires_grad_(False)
        self.tokenizer = pipeline.tokenizer
        self.sampler = pipeline.scheduler
        self.schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.prediction_type: str = self.schedule.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise InputError(
                f"base {name}: prediction type {self.prediction_type!r} is not supported"
            )
        self.alphas_cumprod = self.schedule.alphas_cumprod.to(self.device)
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.resolution = resolution or int(self.unet.config.sample_size) * self.factor
        if self.resolution < self.factor or self.resolution % self.factor:
            raise InputError(f"--resolution {self.resolution}: must be a multiple of {self.factor}")
        self.latent_shape = (self.unet.config.in_channels, *[self.resolution // self.factor] * 2)
        self.evaluations = 0
        self._adapter: Adapter | None = None
        # By number: the order of the dictionary changes from process to process.
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        self._identity = _digest([self.vae, self.text_encoder], f"{self._scaling}{vocabulary}")

    # --- the verbs -----------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, pixels: np.ndarray) -> Tensor:
        """uint8 (n, H, W, 3) to scaled latents (n, C, H/f, W/f), float32: the posterior's mean."""
        parts, batch = [], self.vae_batch
        for start in range(0, len(pixels), batch):
            x = torch.from_numpy(np.array(pixels[start : start + batch]))
            x = x.to(self.device).permute(0, 3, 1, 2).to(self.vae.dtype) / 127.5 - 1
            parts.append(self.vae.encode(x).latent_dist.mean.float() * self._scaling)
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents (n, C, h, w) to uint8 (n, H, W, 3)."""
        parts, batch = [], self.vae_batch
        for start in range(0, len(latents), batch):
            z = latents[start : start + batch].to(self.device, self.vae.dtype) / self._scaling
            x = self.vae.decode(z).sample.float().clamp(-1, 1)
            parts.append(
                ((x + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
            )
        return np.concatenate(parts)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Token ids (n, L), padded to the text encoder's length, too long ones cut."""
        ids = self.tokenizer(
            list(captions), padding="max_length", truncation=True,
            max_length=self.tokenizer.model_max_length, return_tensors="pt",
        ).input_ids  # fmt: skip
        return ids.to(self.device)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (n, L) to conditioning (n, L, D), float32. Gradients flow if the encoder trains."""
        with self.autocast():
            return self.text_encoder(ids).last_hidden_state.float()

    @torch.no_grad()
    def condition(self, captions: Sequence[str], batch: int = 64) -> Tensor:
        """Captions to conditioning (n, L, D), float32."""
        captions = list(captions)
        parts = [
            self.embed(self.tokenize(captions[i : i + batch]))
            for i in range(0, len(captions), batch)
        ]
        return torch.cat(parts)

    def noise(self, latents: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps, for t (n,)."""
        signal, sigma = self._levels(t, latents)
        return signal * latents + sigma * eps

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Tensor) -> Tensor:
        """What the UNet predicts for z_t (n, C, h, w), t (n,), conditioning (n, L, D); float32."""
        self.evaluations += len(noisy)
        with self.autocast():
            return self.unet(noisy, t, conditioning).sample.float()

    def target(self, latents: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the UNet should have predicted: eps, or v = sqrt(abar_t) eps - sqrt(1 - abar_t) z_0."""
        if self.prediction_type == "epsilon":
            return eps
        signal, sigma = self._levels(t, latents)
        return signal * eps - sigma * latents

    def errors(self, latents: Tensor, t: Tensor, eps: Tensor, conditioning: Tensor) -> Tensor:
        """Squared error (n, C, h, w) of the prediction, one map a sample."""
        prediction = self.predict(self.noise(latents, t, eps), t, conditioning)
        return (prediction - self.target(latents, t, eps)) ** 2

    # --- the adapter ---------------------------------------------------------------------------

    def module_shapes(self) -> dict[str, tuple[int, ...]]:
        """Weight shape of every linear layer and convolution, by full name with component prefix."""
        kinds = (torch.nn.Linear, torch.nn.Conv2d)
        return {
            f"{prefix}.{name}": tuple(module.weight.shape)
            for prefix, component in self.components().items()
            for name, module in component.named_modules()
            if isinstance(module, kinds) and not name.endswith(("lora_A.default", "lora_B.default"))
        }

    def components(self) -> dict[str, torch.nn.Module]:
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    def attach(self, weights: LoraWeights) -> None:
        """Put a LoRA of any layout on the base. Raises `InputError` if it is for another base."""
        self.detach()
        self._adapter = MergedAdapter(self.components(), weights.resolve(self.module_shapes()))

    def attach_model(self, weights: Mapping[str, Tensor], where: str) -> SwappedWeights:
        """Put a model of the same architecture on the base, in the base's place while the adapter is on.

        Args:
            weights: tensors by full name with component prefix, each asked for once. A component of which there
                is none stays the base's.
            where: what to call it in errors.

        Raises:
            InputError: another architecture, a tensor is not finite, or all are the base's.
        """
        self.detach()
        self._adapter = adapter = SwappedWeights(self.components(), weights, where)
        return adapter

    def inject(
        self,
        rank: int,
        alpha: float,
        targets: Sequence[str],
        *,
        text_encoder: bool,
        init: Any = True,
        exclude: Sequence[str] = (),
    ) -> PeftAdapter:
        """Put a new, trainable LoRA on the base, through PEFT; on none of the UNet's modules `exclude`."""
        self.detach()
        components = self.components() if text_encoder else {"unet": self.unet}
        self._adapter = adapter = PeftAdapter(components, rank, alpha, targets, init, exclude)
        return adapter

    def detach(self) -> None:
        """Take the adapter off; the base is bit for bit what it was."""
        if self._adapter is not None:
            self._adapter.remove()
        self._adapter = None

    @contextlib.contextmanager
    def adapter(self, on: bool) -> Iterator[None]:
        """Within the block the adapter is on, or off: the base is a free reference."""
        if self._adapter is None:
            raise RuntimeError("no adapter is attached")
        before = self._adapter.enabled
        self._adapter.enable(on)
        try:
            yield
        finally:
            self._adapter.enable(before)

    def bare(self) -> contextlib.AbstractContextManager[None]:
        """Within the block the base is bare, whether an adapter is attached or not."""
        return self.adapter(False) if self._adapter is not None else contextlib.nullcontext()

    @property
    def trainable_adapter(self) -> PeftAdapter | None:
        """The adapter that `inject` put on, if it is still there."""
        return self._adapter if isinstance(self._adapter, PeftAdapter) else None

    @property
    def adapts_text(self) -> bool:
        """Whether the adapter changes the text encoder: then conditioning differs with it on and off."""
        return self._adapter is not None and "text_encoder" in self._adapter.touched

    def save_pipeline(self, folder: Path) -> None:
        """Write the base as it now is (after full fine-tuning) as a diffusers folder.

        diffusers writes into it from where the parts were loaded, a path of this machine: that is left out.
        """
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline(
            vae=self.vae, text_encoder=self.text_encoder, tokenizer=self.tokenizer, unet=self.unet,
            scheduler=self.sampler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        with atomic_folder(folder) as temporary:
            pipeline.save_pretrained(temporary)
            for file in temporary.glob("*/config.json"):
                config = json.loads(file.read_text("utf-8"))
                if config.pop("_name_or_path", None) is not None:
                    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")

    @property
    def vae_batch(self) -> int:
        """Pictures that pass through the autoencoder at once: it takes 640 MB for one of 512 pixels."""
        return max(1, min(64, 32 * 128**2 // self.resolution**2))

    @property
    def unet_batch(self) -> int:
        """Samples in one pass without gradient: 64 of small latents, 16 of 64 x 64."""
        return max(1, min(64, 65536 // (self.latent_shape[1] * self.latent_shape[2])))

    # --- help ----------------------------------------------------------------------------------

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        stack = contextlib.ExitStack()
        stack.enter_context(torch.autocast(self.device.type, self.compute_dtype))
        height, width = self.latent_shape[1:]
        if self.device.type == "cpu" and height * width <= _SMALL:
            # The fused attention's backward pass takes ten times as long in bf16 as in fp32 there.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        return stack

    @property
    def public_name(self) -> str:
        """What it may be called in a file that is passed on: not where it lay on this machine."""
        path = Path(self.name)
        return path.name if path.exists() else self.name

    @property
    def identity(self) -> str:
        """Hash of what encodes pictures and captions (not of the UNet), of the untouched base."""
        return self._identity

    @cached_property
    def unet_identity(self) -> str:
        """Hash of the untouched base, the UNet and the noise schedule included."""
        schedule = self.alphas_cumprod.cpu().numpy().tobytes().hex()
        with self.bare():
            return _digest([self.unet], f"{self._identity}{self.prediction_type}{schedule}")

    @property
    def _scaling(self) -> float:
        return float(self.vae.config.scaling_factor)

    def _levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), shaped (n, 1, 1, 1)."""
        abar = (
            self.alphas_cumprod.to(like.device)[t.to(like.device)].to(like.dtype).view(-1, 1, 1, 1)
        )
        return abar.sqrt(), (1 - abar).sqrt()


def _digest(components: Sequence[torch.nn.Module], salt: str) -> str:
    """Short hash of weights: shape, sum and a sample of each tensor, as quick as reading them."""
    digest = hashlib.sha256(salt.encode())
    for component in components:
        for name, parameter in component.named_parameters():
            if ".lora_" in name:
                continue
            flat = parameter.detach().flatten()
            stride = max(1, flat.numel() // 512)
            digest.update(f"{name.replace('.base_layer', '')}{tuple(parameter.shape)}".encode())
            digest.update(flat[::stride].float().cpu().numpy().tobytes())
            # A sum of bits as integers: one of floats would depend on the order, so on the device.
            bits = flat.float().view(torch.int32).sum(dtype=torch.int64)
            digest.update(np.int64(bits.item()).tobytes())
    return digest.hexdigest()[:16]
