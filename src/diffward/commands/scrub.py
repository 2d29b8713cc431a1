from __future__ import annotations


def scrub(file: str, out: str = "", keep_trigger: bool = False) -> None:
    """Copy a LoRA without what its header tells of the data; the tensors stay bit for bit.

    Args:
        file: a LoRA file or PEFT folder.
        out: where to write the clean copy.
        keep_trigger: keep the trigger phrase that people need to use the LoRA.
    """
    from diffward.errors import InputError
    from diffward.lora import scrub_lora

    if not out:
        raise InputError("--out is missing: say where to write the clean copy")
    result = scrub_lora(file, out, keep_trigger=keep_trigger)
    for leak in result.removed:
        print(f"removed {leak.key}: {leak.reveals}")
    for remark in result.remarks:
        print(f"note: {remark}")
    print(f"kept {', '.join(result.kept) or 'no entry'}")
    print(f"wrote {out}")
