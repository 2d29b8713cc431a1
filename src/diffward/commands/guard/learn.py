from __future__ import annotations

from diffward.guard.settings import GuardSettings


def learn(
    settings: GuardSettings,
    illegal: str = "",
    innocent: str = "",
    base: str = "mini",
    method: str = "freeze",
    out: str = "runs/guard",
    illegal_name: str = "illegal",
    innocent_name: str = "innocent",
    concepts: str = "",
    guide: str = "",
    edit: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    default_caption: str = "",
    limit: int | None = None,
    resolution: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    base_config: str | None = None,
    cache: bool = True,
) -> None:
    """Find which tensors of a base to freeze, so that fine-tuning fails in one domain and works in another.

    Writes OUT/mask.json and OUT/mask.png; methods that edit weights (uce, imma) write OUT/edit.safetensors.
    Run the same command again to resume.

    Args:
        illegal: folder of pictures of the forbidden domain, or several with commas between.
        innocent: folder of pictures of the allowed domain, or several with commas between.
        base: mini, a diffusers folder, a checkpoint file or a hub id.
        method: see `diffward list guards`.
        out: folder for the mask or the edit, the settings and the work files.
        illegal_name: what the mask calls the forbidden domain; it is published with the mask.
        innocent_name: what the mask calls the allowed domain.
        concepts: uce: words to erase, with commas between.
        guide: uce: words that stand in their place.
        edit: start from a base edited before (OUT/edit.safetensors of uce or imma).
        default_caption: caption of pictures that have none.
        limit: use only so many of the pictures of a folder.
        resolution: side in pixels; the base's own by default.
        device: auto, cpu, cuda, mps.
        precision: auto (bf16 on a GPU), fp32 or bf16.
        base_config: diffusers folder that describes a single-file checkpoint, where there is no network.
        cache: keep encoded pictures and captions on disk for the next run.
    """
    from pathlib import Path

    from diffward.guard.domains import Domains
    from diffward.guard.run import PLOT, run_learning, start_processes
    from diffward.models.load import load_base

    domains = Domains.load(
        method, illegal, innocent, (illegal_name, innocent_name), limit=limit, image_column=image_column,
        caption_column=caption_column, default_caption=default_caption,
    )  # fmt: skip
    for name, pictures in (("illegal", domains.illegal), ("innocent", domains.innocent)):
        for line in pictures.told() if len(pictures) else ["none"]:
            print(f"{name}: {line}")
    start_processes(device)
    denoiser = load_base(
        base, device=device, precision=precision, resolution=resolution, config=base_config
    )
    config = {
        "illegal": illegal, "innocent": innocent, "base": base, "method": method, "out": out,
        "illegal_name": illegal_name, "innocent_name": innocent_name, "concepts": concepts, "guide": guide,
        "edit": edit, "image_column": image_column, "caption_column": caption_column,
        "default_caption": default_caption, "limit": limit, "resolution": resolution, "device": device,
        "precision": precision, "base_config": base_config, "cache": cache,
    }  # fmt: skip
    words = [word.strip() for word in concepts.split(",") if word.strip()]
    learned = run_learning(
        denoiser, domains, method, settings, Path(out), concepts=words, guide=guide, edit=edit, config=config,
        cache=cache,
    )  # fmt: skip
    if learned.mask is None:
        print(f"wrote {learned.file}: give it to `diffward guard apply --edit`")
        return
    print(f"wrote {learned.file}: {learned.mask.told()}; {PLOT} shows where")
    for state, losses in learned.mask.facts.get("losses", {}).items():
        print(f"{state}: loss illegal {losses['illegal']:.4f}, innocent {losses['innocent']:.4f}")
