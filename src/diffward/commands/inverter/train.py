from __future__ import annotations

from diffward.inversion.learn import InverterSettings


def train(
    zoo: str,
    settings: InverterSettings,
    out: str = "runs/inverter",
    empty: str = "",
    base: str = "mini",
    eye: str = "attributes",
    device: str = "auto",
    precision: str = "auto",
    base_config: str | None = None,
) -> None:
    """Train the network that reads LoRAs, from a zoo of them. Writes OUT/inverter.safetensors.

    Run the same command again to resume.

    Args:
        zoo: folder of `diffward zoo build`.
        out: folder for the inverter and its checkpoints.
        empty: zoos of LoRAs that hold no subject of this kind (commas between), so that such are told apart.
        base: the base of the zoo: mini, a diffusers folder, a checkpoint file or a hub id.
        eye: what looks at pictures of subjects: attributes (mini's world) or transformers:FOLDER (an image model).
        precision: auto (bf16 on a GPU), fp32 or bf16.
        base_config: diffusers folder that describes a single-file checkpoint, where there is no network.
    """
    from pathlib import Path

    from diffward.errors import InputError
    from diffward.inversion.learn import prepare, train_inverter
    from diffward.inversion.zoo import Zoo
    from diffward.models.eyes import open_eye
    from diffward.models.load import load_base

    opened = Zoo(zoo)
    for shard in opened.damaged:
        print(f"shard {shard} is damaged or missing and left out; diffward zoo build makes it anew")
    denoiser = load_base(
        base,
        device=device,
        precision=precision,
        resolution=opened.head.resolution,
        config=base_config,
    )
    if denoiser.unet_identity != opened.head.base_identity:
        raise InputError(
            f"{zoo}: its LoRAs are of {opened.head.base} ({opened.head.base_identity}), not of {base}"
        )
    others = [Zoo(one) for one in empty.split(",") if one]
    material = prepare(opened, open_eye(eye, str(denoiser.device)), settings.side, others)
    print(
        f"zoo {zoo}: {len(material.train)} saves to learn from, {len(material.test.last())} held-out LoRAs"
    )
    inverter = train_inverter(material, settings, Path(out), denoiser)
    file = Path(out) / "inverter.safetensors"
    inverter.save(file)
    told = inverter.facts.held_out
    for name in ("encoder", "floor", "shuffled"):
        figures = told[name]
        print(
            f"{name}: top-1 {figures['top1']:.1%}, top-10 {figures['top10']:.1%} of a gallery of {figures['gallery']}, "
            f"{figures['victims']} victims"
        )
    print(f"wrote {file}")
