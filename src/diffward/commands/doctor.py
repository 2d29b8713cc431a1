from __future__ import annotations


def doctor() -> int:
    """Is everything here that diffward needs? Exits with 1 if not."""
    import importlib.util
    import shutil

    from diffward.data import cache_root
    from diffward.models.mini import PIPELINE, READER
    from diffward.provenance import hardware, versions

    healthy = True
    for name, version in versions().items():
        print(f"{name}: {version}")
        healthy &= version != "missing"
    import torch

    from diffward.models.load import pick_device

    device = pick_device("auto")
    print(f"device: {hardware(device)}")
    if importlib.util.find_spec("torchvision"):
        try:
            importlib.import_module("torchvision")
        except Exception as error:
            healthy = False
            print(
                f"torchvision: is installed but does not load ({str(error)[:80]}); remove it, nothing here needs it"
            )
    for what, path in (
        ("embedded base", PIPELINE / "model_index.json"),
        ("attribute network", READER),
    ):
        print(f"{what}: {'there' if path.exists() else 'missing'}")
        healthy &= path.exists()
    root = cache_root()
    size = sum(f.stat().st_size for f in root.rglob("*") if f.is_file()) if root.exists() else 0
    free = shutil.disk_usage(root if root.exists() else root.anchor).free
    print(f"cache: {size / 1e6:.0f} MB used, {free / 1e9:.0f} GB free")
    print(f"threads: {torch.get_num_threads()}")
    print("all is well" if healthy else "something is missing")
    return 0 if healthy else 1
