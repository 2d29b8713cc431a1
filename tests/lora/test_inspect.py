"""What `inspect` reports, on real files and made ones, and that it stays light."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffward.errors import InputError
from diffward.lora import inspect_lora, open_lora
from diffward.lora.raw import to_float32

from .helpers import factors

CASES = {
    # file: (format, kind, base family, modules, rank, dead modules)
    "cloneofsimo__contents__lora_kiriko.pt": ("cloneofsimo-list", "lora", "sd2", 128, 4, 32),
    "cloneofsimo__contents__lora_kiriko.text_encoder.pt": (
        "cloneofsimo-list",
        "lora",
        "sd2",
        92,
        4,
        0,
    ),
    "cloneofsimo__example_loras__analog_svd_rank4.safetensors": (
        "cloneofsimo",
        "lora",
        "sd1",
        192,
        4,
        0,
    ),
    "cloneofsimo__example_loras__lora_disney.safetensors": (
        "cloneofsimo",
        "lora",
        "sd1",
        192,
        1,
        0,
    ),
    "cloneofsimo__example_loras__lora_illust.pt": ("cloneofsimo-list", "lora", "sd2", 128, 4, 32),
    "cloneofsimo__example_loras__lora_kiriko2.ti.pt": (
        "embedding",
        "textual_inversion",
        "sd1",
        0,
        None,
        0,
    ),
    "lycoris__lokr_dim4.safetensors": ("kohya", "lokr", "sd1", 350, 4, 3),
}


@pytest.mark.parametrize("name", CASES)
def test_published_files(shared_lora, name):
    report = inspect_lora(shared_lora / name)
    found = (report.format, report.kind, report.base_family, report.modules, report.rank)
    assert (*found, len(report.dead_modules)) == CASES[name]
    assert report.measured_modules == report.modules
    assert report.sha256 and report.family_conflict is None
    json.dumps(report.to_dict(), allow_nan=False)


def test_all_published_files_are_covered(shared_lora):
    assert {p.name for p in shared_lora.iterdir()} == {*CASES, "flux_aitoolkit_peft_header.json"}
    with pytest.raises(InputError, match="JSON"):
        inspect_lora(shared_lora / "flux_aitoolkit_peft_header.json")


def test_bundled_embeddings(shared_lora):
    report = inspect_lora(shared_lora / "cloneofsimo__example_loras__lora_disney.safetensors")
    assert report.extras == {"<s1>": [768], "<s2>": [768]}
    assert [leak.key for leak in report.leaks] == ["(embeddings)"]


def test_flux_file_that_claims_to_be_sd1(shared_lora, tmp_path):
    header = json.loads((shared_lora / "flux_aitoolkit_peft_header.json").read_text())
    tensors = {
        name: torch.ones(info["shape"], dtype=torch.float16)
        for name, info in header["tensors"].items()
    }
    save_file(tensors, tmp_path / "flux.safetensors", header["metadata"])
    report = inspect_lora(tmp_path / "flux.safetensors")
    assert report.base_family == "flux" and report.format == "diffusers"
    assert "FLUX" in report.family_conflict and "SD 1.x" in report.family_conflict
    assert (report.rank, report.modules) == (16, 4)
    reveals = {leak.key: leak.reveals for leak in report.leaks}
    assert "YEW" in reveals["ss_tag_frequency"] and "ai-toolkit" in reveals["software"]


@pytest.mark.parametrize(
    "cross, family", [(768, "sd1"), (1024, "sd2"), (2048, "sdxl"), (64, "unet-64")]
)
def test_family_from_widths(tmp_path, cross, family):
    down, up = factors(320, cross, 2, 0)
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    save_file(
        {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up},
        tmp_path / "a.safetensors",
        {"ss_base_model_version": "sd_v1"},
    )
    report = inspect_lora(tmp_path / "a.safetensors")
    assert report.base_family == family
    assert (report.family_conflict is None) == (family in ("sd1", "unet-64"))


def test_norms_and_effective_rank_equal_the_full_matrix(kohya_file):
    report = inspect_lora(kohya_file)
    loaded = open_lora(kohya_file).load()
    assert report.rank == [2, 3] and report.alpha == pytest.approx([0.7, 1.0, 3.0, 4.0])
    for entry in report.per_module:
        delta = loaded.modules[entry.name].delta().flatten(1).double()
        assert entry.norm == pytest.approx(float(delta.norm()), rel=1e-5)
        values = torch.linalg.svdvals(delta)[: entry.rank]
        p = values / values.sum()
        expected = float((-(p * p.log()).sum()).exp())
        assert entry.effective_rank == pytest.approx(expected, rel=1e-4)
    total = sum(
        m.tensors["up"].numel() + m.tensors["down"].numel() for m in loaded.modules.values()
    )
    assert report.parameters == total


def test_dead_modules_and_minus_zero(tmp_path):
    tensors = {}
    for index in range(4):
        down, up = factors(8, 8, 2, index)
        stem = f"lora_unet_down_blocks_{index}_attentions_0_proj_in"
        tensors[f"{stem}.lora_down.weight"] = down
        tensors[f"{stem}.lora_up.weight"] = torch.full_like(up, -0.0) if index == 2 else up
    save_file(tensors, tmp_path / "a.safetensors")
    report = inspect_lora(tmp_path / "a.safetensors")
    assert report.dead_modules == ["unet.down_blocks.2.attentions.0.proj_in"]


def test_budget_spreads_over_the_file(tmp_path, monkeypatch):
    tensors = {}
    for index in range(40):
        down, up = factors(32, 32, 4, index)
        stem = f"unet.down_blocks.{index}.attentions.0.proj_in"
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = down, up
    save_file(tensors, tmp_path / "a.safetensors")
    from diffward.lora import inspection

    monkeypatch.setattr(inspection, "BUDGET_BYTES", 10 * 1024)
    report = inspect_lora(tmp_path / "a.safetensors")
    assert report.modules == 40 and report.measured_modules == 10
    assert inspect_lora(tmp_path / "a.safetensors", full=True).measured_modules == 40


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("BF16", torch.bfloat16),
        ("F16", torch.float16),
        ("F8_E4M3", torch.float8_e4m3fn),
        ("F8_E5M2", torch.float8_e5m2),
    ],
)
def test_hand_conversion_of_small_floats(name, dtype):
    bits = 8 if name.startswith("F8") else 16
    codes = np.arange(2**bits, dtype=f"u{bits // 8}")
    expected = torch.from_numpy(codes.copy()).view(dtype).float().numpy()
    assert np.array_equal(to_float32(codes.tobytes(), name), expected, equal_nan=True)


def test_safetensors_need_no_torch(kohya_file):
    code = (
        "import sys; from diffward.lora import inspect_lora; inspect_lora(sys.argv[1]);"
        "print([m for m in ('torch', 'diffusers', 'peft', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(kohya_file)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_textual_inversion_is_not_loaded_as_lora(tmp_path):
    save_file({"<krk>": torch.zeros(768)}, tmp_path / "ti.safetensors")
    assert inspect_lora(tmp_path / "ti.safetensors").kind == "textual_inversion"
    with pytest.raises(InputError, match="textual-inversion"):
        open_lora(tmp_path / "ti.safetensors").load()
    torch.save({"string_to_param": {"*": torch.zeros(2, 768)}, "name": "anna"}, tmp_path / "a.pt")
    assert inspect_lora(tmp_path / "a.pt").extras == {"<anna>": [2, 768]}
