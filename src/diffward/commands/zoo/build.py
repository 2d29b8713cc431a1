from __future__ import annotations

from typing import Literal

from diffward.inversion.recipe import Ranges


def build(
    ranges: Ranges,
    out: str = "runs/zoo",
    base: str = "mini",
    subjects: str = "world",
    count: int = 2000,
    seed: int = 0,
    per_shard: int = 64,
    test_share: float = 0.15,
    workers: int = 1,
    cluster: Literal["ray"] | None = None,
    resolution: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    base_config: str | None = None,
) -> None:
    """Train many LoRAs, each of another subject and by another recipe, to learn what weights give away.

    Run the same command again to resume; a larger --count makes a zoo grow.

    Args:
        out: folder of the zoo.
        base: mini, a diffusers folder, a checkpoint file or a hub id.
        subjects: world (fictional people of mini's world), world:logo, world:garment, or a folder with one folder of
            pictures a subject. Pictures of real people need their consent.
        count: LoRAs in all, one a subject.
        per_shard: LoRAs that are trained at once and kept in one file.
        test_share: share of the subjects that no network learns from; half as many are for validation.
        workers: processes on this machine, each with its share of the cores.
        cluster: ray trains shards as Ray tasks (pip install diffward[cluster]).
        resolution: side in pixels; the base's own by default.
        precision: auto (bf16 on a GPU), fp32 or bf16.
        base_config: diffusers folder that describes a single-file checkpoint, where there is no network.
    """
    from pathlib import Path

    from diffward.inversion.build import Source, build_zoo

    zoo = build_zoo(
        Path(out), Source(base, device, precision, base_config), subjects, ranges, count=count, seed=seed,
        per_shard=per_shard, test_share=test_share, workers=workers, cluster=cluster, resolution=resolution,
    )  # fmt: skip
    identities = {row.identity for row in zoo.rows}
    print(
        f"zoo {out}: {len({r.lora for r in zoo.rows})} LoRAs of {len(identities)} subjects, {len(zoo)} saves, "
        f"{zoo.head.shards} shards"
    )
