from __future__ import annotations


def inspect(file: str, json: bool = False, full: bool = False) -> None:
    """What the file itself gives away: header, format, ranks, spectrum. No base, no GPU, seconds.

    Args:
        file: a LoRA file or folder.
        json: print JSON.
        full: measure the norm and spectrum of every module, however large the file.
    """
    from diffward.errors import InputError
    from diffward.lora import inspect_lora

    try:
        inspection = inspect_lora(file, full)
    except InputError:
        from diffward.models.full import find_full

        if find_full(file) is None:
            raise
        raise InputError(
            f"{file}: is a full model, not a LoRA; diffward audit {file} says what it gives away"
        ) from None
    if json:
        from json import dumps

        print(dumps(inspection.to_dict(), indent=2))
        return
    from diffward.report.terminal import show_inspection

    show_inspection(inspection)
