from __future__ import annotations


def verify(base: str, candidate: str, mask: str, json: bool = False) -> int:
    """Did a fine-tuned model keep to the mask? Names every frozen tensor that moved; exits with 1 if one did.

    Reads a tensor at a time. Full fine-tunes, casts, moving averages, merged LoRAs and LoRAs of their own.

    Args:
        base: the model that the mask was made for.
        candidate: a fine-tuned model (folder or file), or a LoRA.
        mask: its mask, or the guarded folder that holds it.
        json: print JSON.
    """
    from diffward.guard.artefacts import read_mask
    from diffward.guard.verify import verify as compare

    verdict = compare(base, candidate, read_mask(mask))
    if json:
        from json import dumps

        print(dumps(verdict.to_dict(), indent=2, allow_nan=False))
    else:
        print("\n".join(verdict.told()))
    return 0 if verdict.ok else 1
