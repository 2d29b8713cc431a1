from __future__ import annotations


def audit(
    file: str,
    base: str = "mini",
    members: str | None = None,
    non_members: str | None = None,
    data: str | None = None,
    split: str | None = None,
    out: str = "runs/audit",
    fail_above: str | None = None,
    pairs: int = 16,
    batch: int | None = None,
    seed: int = 0,
    image_column: str | None = None,
    caption_column: str | None = None,
    default_caption: str = "",
    resolution: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    base_config: str | None = None,
    thumbnails: bool = False,
    cache: bool = True,
) -> int:
    """What does this LoRA give away? Writes OUT/report.html, OUT/report.json and OUT/scores.csv.

    Give the pictures it was trained on and held-out ones of the same source, as two folders
    (--members, --non-members) or as one folder and the split it was trained with (--data, --split).
    Without pictures only the file itself is looked at, and no base is loaded.

    Args:
        file: a LoRA file or folder of any layout.
        base: the base it was made for: mini, a diffusers folder, a checkpoint file or a hub id.
        members: folder of pictures it was trained on.
        non_members: folder of pictures of the same kind that it was not trained on.
        data: folder with both, divided by --split.
        split: manifest of `diffward split`, or OUT/split.json of `diffward train --holdout`.
        fail_above: exit with 1 above this: auc=0.6, tpr@0.05=0.2 or level=medium.
        pairs: noise draws a picture; more are slower and surer.
        batch: samples in one pass; by default what fits the size.
        thumbnails: put small copies of the pictures into the page. Page and scores name the pictures and
            tell which were trained on: they are for you, not for passing on.
        cache: keep scores on disk: an interrupted audit goes on where it stopped.
    """
    from pathlib import Path

    from diffward.errors import InputError
    from diffward.lora import open_lora
    from diffward.report.audit import audit_lora, load_sides
    from diffward.report.build import write_report
    from diffward.report.gate import parse_gate
    from diffward.report.terminal import show_report

    config = dict(locals())
    config = {k: v for k, v in config.items() if isinstance(v, str | int | float | bool | None)}
    for option, value, least in (
        ("pairs", pairs, 2),
        ("seed", seed, 0),
        ("batch", 1 if batch is None else batch, 1),
    ):
        if value < least:
            raise InputError(f"--{option} {value}: must be at least {least}")
    gate = parse_gate(fail_above) if fail_above else None
    open_lora(file)  # bad files are named before anything heavy is loaded
    columns = {
        "image_column": image_column,
        "caption_column": caption_column,
        "default_caption": default_caption,
    }
    sides, notes = load_sides(members, non_members, data, split, **columns)
    for note in notes:
        print(note)
    denoiser = None
    if sides is not None:
        from diffward.models.load import load_base

        denoiser = load_base(
            base, device=device, precision=precision, resolution=resolution, config=base_config
        )
    report, per_image = audit_lora(
        denoiser,
        file,
        sides,
        pairs=pairs,
        batch=batch,
        seed=seed,
        cache=cache,
        thumbnails=thumbnails,
        config=config,
    )
    page, _ = write_report(report, per_image, Path(out))
    show_report(report)
    print(f"open {page}")
    crossed = gate.crossed(report) if gate else []
    for line in crossed:
        print(f"gate: {line}")
    return 1 if crossed else 0
