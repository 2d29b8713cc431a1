"""Makes a diffusers folder with the architecture of Stable Diffusion 1.5 at full size, weights random.

`python -m bench.make_sd15 OUT [--prediction v_prediction]`: 2.1 GB, half precision, no network.
Everything that depends on sizes and not on values can be tried on it: names and shapes of modules,
memory, speed, conversion.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

# As counted on the published weights.
PARAMETERS = {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863}
_VOCABULARY = 49_408
_LENGTH = 77


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prediction", default="epsilon", choices=["epsilon", "v_prediction"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_sd15(args.out, args.prediction, args.seed)
    print(f"wrote {args.out}")


def make_sd15(out: Path, prediction: str = "epsilon", seed: int = 0) -> Path:
    """Write the folder; each part is asserted to have the parameters of the real one."""
    pipeline = new_pipeline(prediction, seed)
    for name in PARAMETERS:
        getattr(pipeline, name).half()
    pipeline.save_pretrained(out)
    return out


def new_pipeline(prediction: str = "epsilon", seed: int = 0) -> Any:
    """The pipeline in memory, fp32 (4.3 GB)."""
    import torch
    from diffusers import (
        AutoencoderKL,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    vae = AutoencoderKL(
        sample_size=512,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=0.18215,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=_VOCABULARY,
            hidden_size=768,
            projection_dim=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=_LENGTH,
            hidden_act="quick_gelu",
            bos_token_id=_VOCABULARY - 2,
            eos_token_id=_VOCABULARY - 1,
            pad_token_id=_VOCABULARY - 1,
        )
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        skip_prk_steps=True, set_alpha_to_one=False, prediction_type=prediction,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=text_encoder.eval(), tokenizer=_new_tokenizer(), unet=unet.eval(),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    for name, count in PARAMETERS.items():
        found = sum(p.numel() for p in getattr(pipeline, name).parameters())
        assert found == count, f"{name}: {found:,} parameters, {count:,} wanted"
    return pipeline


def _new_tokenizer() -> Any:
    """As many tokens as CLIP's, the special ones at its numbers; few of the others are ever used."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    from diffward.models.mini import world
    from diffward.models.mini.vocabulary import learn_merges

    merges = learn_merges([world.sample([0, 4, i]).caption for i in range(200)], 300)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in merges)]
    tokens += [f"<|unused{i}|>" for i in range(_VOCABULARY - 2 - len(tokens))]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    assert len(vocab) == _VOCABULARY
    with tempfile.TemporaryDirectory() as folder:
        # Saved and loaded once: only then are the special tokens where the folder will have them.
        CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=_LENGTH).save_pretrained(folder)
        return CLIPTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    main()
