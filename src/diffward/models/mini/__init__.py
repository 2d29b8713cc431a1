"""The embedded base: a small, complete Stable Diffusion pipeline and the world it was trained on."""

from __future__ import annotations

from pathlib import Path

# The diffusers pipeline folder; `StableDiffusionPipeline.from_pretrained(PIPELINE)` loads it.
PIPELINE = Path(__file__).parent / "pipeline"
# The attribute network that measures pictures of the world (never used in training the pipeline).
READER = Path(__file__).parent / "reader.safetensors"
