"""What ran: versions, hardware, settings. Written beside every output."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

_PACKAGES = (
    "diffward",
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "numpy",
)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def hardware(device: str = "cpu") -> dict[str, Any]:
    """The machine in words; no host name and no user."""
    told: dict[str, Any] = {
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        told["threads"] = torch.get_num_threads()
        if device.startswith("cuda"):
            told["gpu"] = torch.cuda.get_device_name(device)
    return {"device": device, **told}


def write_config(config: dict[str, Any], path: Path) -> None:
    """The effective settings as YAML, which `--config` reads back."""
    import yaml

    from diffward.files import write_text

    write_text(path, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
