from __future__ import annotations

from typing import Literal


def audit(
    file: str,
    base: str = "mini",
    members: str | None = None,
    non_members: str | None = None,
    data: str | None = None,
    split: str | None = None,
    out: str = "runs/audit",
    fail_above: str | None = None,
    attacks: str = "standard",
    captions: Literal["known", "unknown"] = "known",
    pairs: int = 16,
    shadows: int = 0,
    shadow_epochs: float = 50.0,
    shadow_lr: float = 1e-3,
    shadow_schedule: Literal["constant", "cosine"] = "constant",
    cluster: Literal["ray"] | None = None,
    canaries: bool = False,
    inverter: str | None = None,
    eye: str | None = None,
    draws: int | None = None,
    class_prompt: str = "",
    weights: bool = True,
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
    """What does this LoRA or fully fine-tuned model give away? Writes OUT/report.html, OUT/report.json and OUT/scores.csv.

    Give the pictures it was trained on and held-out ones of the same source, as two folders
    (--members, --non-members) or as one folder and the split it was trained with (--data, --split).
    Without pictures only the file itself is looked at; the base is loaded if its LoRAs can be read without pictures.

    Args:
        file: a LoRA file or folder of any layout; or a full model: a diffusers folder, such as OUT/pipeline of
            `diffward train --tune full`, or a checkpoint file.
        base: the base it was made for or trained from: mini, a diffusers folder, a checkpoint file or a hub id.
        members: folder of pictures it was trained on.
        non_members: folder of pictures of the same kind that it was not trained on.
        data: folder with both, divided by --split.
        split: manifest of `diffward split`, or OUT/split.json of `diffward train --holdout`.
        fail_above: exit with 1 above this: auc=0.6, tpr@0.05=0.2 or level=medium.
        attacks: standard, thorough (all of `diffward list attacks`), or names with commas between.
        captions: whether the attacker knows the captions.
        pairs: noise draws a picture; more are slower and surer.
        shadows: train so many LoRAs on random halves of the pictures, for lira and rmia; they are kept in
            OUT/shadows, and a stopped run goes on. 8 to 16 are usual, 4 the least.
        shadow_epochs: passes over each picture of a shadow; as many as the audited LoRA had.
        shadow_lr: learning rate of the shadows.
        shadow_schedule: how it goes over the steps, as that of the audited LoRA.
        cluster: ray trains the shadows as Ray tasks (pip install diffward[cluster]).
        canaries: bound epsilon from below; the split must come from `diffward split --canaries`.
        inverter: file of `diffward inverter train` that reads LoRAs of this base; for mini one comes with diffward.
        eye: the image model that the inverter learned with (transformers:FOLDER), where it does not lie under its old name.
        draws: pictures drawn to look for copies; by default 32 where latents are small or there is a GPU, else none.
        class_prompt: what any picture of the kind would be called ("a photo of a dog"): drawn beside what the weights show.
        weights: ask the weights of a LoRA who and what is in them (identity, copies, words, number of pictures).
        batch: samples in one pass; by default what fits the size.
        thumbnails: put small copies of the pictures into the page. Page and scores name the pictures and
            tell which were trained on: they are for you, not for passing on.
        cache: keep scores on disk: an interrupted audit goes on where it stopped.
    """
    from pathlib import Path

    from diffward.errors import InputError
    from diffward.inversion.inverter import open_inverter
    from diffward.membership.evaluate import chosen_attacks as check_attacks
    from diffward.models.full import find_full
    from diffward.report.audit import AuditOptions, WeightsOptions, audit_lora, load_sides
    from diffward.report.build import write_report
    from diffward.report.gate import parse_gate
    from diffward.report.subject import open_audited, reads
    from diffward.report.terminal import show_report

    config = dict(locals())
    config = {k: v for k, v in config.items() if isinstance(v, str | int | float | bool | None)}
    options = AuditOptions(
        attacks=attacks, captions=captions, pairs=pairs, canaries=canaries, shadows=shadows,
        shadow_epochs=shadow_epochs, shadow_lr=shadow_lr, shadow_schedule=shadow_schedule,
        shadow_folder=Path(out) / "shadows", cluster=cluster,
        batch=batch, seed=seed, cache=cache,
    )  # fmt: skip
    check_attacks(attacks)
    gate = parse_gate(fail_above) if fail_above else None
    open_audited(file, shadows=shadows)  # bad files are named before anything heavy is loaded
    columns = {
        "image_column": image_column,
        "caption_column": caption_column,
        "default_caption": default_caption,
    }
    sides, notes = load_sides(members, non_members, data, split, **columns)
    for note in notes:
        print(note)
    asked = WeightsOptions(
        Path(inverter) if inverter else None, eye, draws, captions == "known", class_prompt, weights, seed
    )  # fmt: skip
    if inverter and find_full(file) is not None:
        raise InputError(
            f"--inverter {inverter}: reads LoRAs, and {file} is a full model; leave it out"
        )
    denoiser = None
    if sides is not None or (weights and (inverter or reads(file))):
        from diffward.models.load import load_base

        denoiser = load_base(
            base, device=device, precision=precision, resolution=resolution, config=base_config
        )
    if inverter and denoiser is not None:
        open_inverter(
            asked.inverter, denoiser
        )  # one that does not fit is named before hours of attacks
    report, per_image = audit_lora(
        denoiser, file, sides, options, weights=asked, thumbnails=thumbnails, config=config
    )
    page, _ = write_report(report, per_image, Path(out))
    show_report(report)
    print(f"open {page}")
    crossed = gate.crossed(report) if gate else []
    for line in crossed:
        print(f"gate: {line}")
    return 1 if crossed else 0
