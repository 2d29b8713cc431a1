from __future__ import annotations

from diffward.guard.evaluate import EvaluateSettings


def evaluate(
    settings: EvaluateSettings,
    illegal: str = "",
    illegal_held_out: str = "",
    innocent: str = "",
    innocent_held_out: str = "",
    base: str = "mini",
    mask: str | None = None,
    edit: str | None = None,
    subjects: str = "",
    others: str = "",
    class_prompt: str = "",
    innocent_class_prompt: str = "",
    eye: str = "attributes",
    out: str = "runs/guard-evaluation",
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
    """What attackers still can do with a guarded base: a page to read in OUT, and the same as JSON.

    The guards are none, random masks of the same share of parameters, the edit, the mask, and both. Each attacker
    fine-tunes each of them, in both domains, once a seed. Run the same command again to resume.

    Args:
        illegal: pictures that attackers train on, a sub-folder a subject.
        illegal_held_out: other pictures of the same subjects, in sub-folders of the same names; their
            captions are the prompts.
        innocent: pictures of the allowed domain that users train on.
        innocent_held_out: other pictures of the allowed domain.
        base: mini, a diffusers folder, a checkpoint file or a hub id; not guarded yet.
        mask: mask.json of `diffward guard learn`, or a positional text file of the public code.
        edit: edit.safetensors of uce or imma; several with commas between, NAME= before each if you like.
        subjects: names of the subjects that are attacked, with commas between; all of --illegal by default.
        others: pictures of others, a sub-folder each, from whom the subjects are to be told.
        class_prompt: what dreambooth's class pictures are drawn with (a photo of a person).
        innocent_class_prompt: the same in the allowed domain.
        eye: what recognises subjects: attributes (the embedded base's world only), or transformers:FOLDER
            (or a hub id) of an image model.
        out: folder for the page and the pictures.
    """
    config = dict(locals())
    del config["settings"]

    from dataclasses import asdict
    from pathlib import Path

    from diffward.guard.case import Case, guards_of, mask_words
    from diffward.guard.evaluate import evaluate as attack
    from diffward.guard.plot import draw_mask
    from diffward.models.eyes import open_eye
    from diffward.models.load import load_base
    from diffward.provenance import hardware, versions, write_config
    from diffward.report.guard import write_guard_page

    case = Case.load(
        illegal, illegal_held_out, innocent, innocent_held_out, subjects=subjects, others=others, limit=limit,
        image_column=image_column, caption_column=caption_column, default_caption=default_caption,
    )  # fmt: skip
    for note in case.notes:
        print(f"note: {note}")
    denoiser = load_base(
        base, device=device, precision=precision, resolution=resolution, config=base_config
    )
    guards, given = guards_of(denoiser, mask, edit, settings.seeds)
    seen = open_eye(eye, str(denoiser.device))
    sides = case.sides(denoiser, class_prompt, innocent_class_prompt, cache=cache, eye=seen)
    facts = mask_words(given) if given else None
    write_config({**config, **asdict(settings)}, Path(out) / "config.yaml")
    found = attack(denoiser, guards, *sides, settings, Path(out) / "work", eye=seen)
    plot = Path(out) / "mask.png"
    if given:
        draw_mask(given, plot)
    page, data = write_guard_page(
        found, Path(out), mask_plot=plot if given else None, mask_facts=facts,
        provenance={"versions": versions(), "hardware": hardware(str(denoiser.device))},
    )  # fmt: skip
    print(f"wrote {data}")
    print(f"open {page}")
