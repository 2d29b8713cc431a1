"""Audits of fully fine-tuned models: the same figures as for a LoRA that says the same, and an honest report."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffward.commands.main import main
from diffward.errors import InputError
from diffward.lora import LoraModule, LoraWeights, open_lora, write_lora
from diffward.membership.factors import CHANGE_RANK, change_factors
from diffward.models.full import find_full
from diffward.report.audit import AuditOptions, Sides, audit_lora
from diffward.report.build import write_report
from diffward.report.schema import validate_report
from diffward.report.terminal import show_report

from ..models.single_file import ldm_checkpoint

CONV, DOWN = "unet.mid_block.resnets.0.conv1", "unet.down_blocks.0.downsamplers.0.conv"
ATTENTION = "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


def made(denoiser, rank=2):
    """A LoRA on every matrix of the attention, two convolutions, and the text encoder."""
    g, modules = torch.Generator().manual_seed(3), {}
    for name, shape in denoiser.module_shapes().items():
        if ".attn" not in name and ".self_attn" not in name and name not in (CONV, DOWN):
            continue
        down = torch.randn(rank, *shape[1:], generator=g) / np.prod(shape[1:]) ** 0.5
        up = 0.3 * torch.randn(shape[0], rank, *(1,) * (len(shape) - 2), generator=g)
        modules[name] = LoraModule.of(name, down, up, float(rank))
    return LoraWeights(modules)


@pytest.fixture
def pair(tiny_pipeline, denoiser, tmp_path):
    """The same change as (LoRA file, model's folder as diffusers saves it)."""
    weights, pipe = made(denoiser), tiny_pipeline()
    write_lora(weights, tmp_path / "a.safetensors", "diffusers")
    for name, module in open_lora(tmp_path / "a.safetensors").load().modules.items():
        prefix, path = name.split(".", 1)
        path = path.removeprefix("text_model.")
        weight = getattr(pipe, prefix).get_submodule(path).weight
        weight.data += module.delta().view(weight.shape)
    pipe.save_pretrained(tmp_path / "run" / "pipeline")
    return tmp_path / "a.safetensors", tmp_path / "run" / "pipeline"


@pytest.fixture
def sides(pictures):
    everyone = list(pictures)
    from diffward.data import Pictures

    return Sides(Pictures(everyone[:3]), Pictures(everyone[3:]), ["a note"])


def audited(denoiser, path, sides, **options):
    given = {"attacks": "standard", "pairs": 4, "cache": False, **options}
    return audit_lora(denoiser, path, sides, AuditOptions(**given))


def test_a_merged_lora_scores_as_the_lora_itself(pair, denoiser, sides):
    """Every attack that only asks the denoiser, those along factors not: theirs are turned and scaled."""
    lora, model = pair
    free = "calibrated,loss,clid,pia,secmi,sima,pfami"
    (_, ours), (_, truth) = (audited(denoiser, p, sides, attacks=free) for p in (model, lora))
    assert set(ours["scores"]) == set(free.split(","))
    for name, scores in truth["scores"].items():
        assert np.abs(np.subtract(ours["scores"][name], scores)).max() <= 1e-5 * max(1, np.abs(scores).max()), name  # fmt: skip
    assert np.ptp(truth["scores"]["calibrated"]) > 1e-3  # the adapter does something


def test_the_report_of_a_model(pair, denoiser, sides, tmp_path, capsys):
    _, model = pair
    (model.parent / "run.json").write_text(
        json.dumps({"passes_per_picture": 7, "steps": 9, "settings": {"tune": "full"}})
    )
    report, each = audited(denoiser, model, sides, attacks="thorough")
    assert validate_report(report) == []
    subject, found = report["subject"], report["membership"]
    changed = list(made(denoiser).modules)
    assert subject["format"] == "full model" and subject["rank"] is None
    assert subject["modules"] == len(changed)
    shapes = denoiser.module_shapes()
    assert subject["parameters"] == sum(int(np.prod(shapes[name])) for name in changed)
    assert set(found["skipped"]) == {"lira", "lira_offline", "rmia"}
    assert "this is a full model" in found["skipped"]["rmia"]
    assert {"gsa1", "gsa2", "adaptive", "calibrated"} < set(found["attacks"])
    assert found["exposure"] == {"passes": 7.0, "steps": 9, "source": "run.json"}
    assert report["provenance"]["notes"] == ["a note"]
    page, _ = write_report(report, each, tmp_path / "out")
    html = page.read_text()
    assert "what this model gives away" in html and "Tensors that are not the base" in html
    assert "Rank</th>" not in html
    show_report(report)
    assert "lira, lira_offline, rmia: needs shadow LoRAs, and this is a full model" in capsys.readouterr().out  # fmt: skip


def test_factors_span_the_change(pair, denoiser):
    """A LoRA's change is of its rank: the factors give it back. A change of full rank: its largest part."""
    lora, model = pair
    swapped = find_full(model).attach(denoiser)
    truth = open_lora(lora).load().resolve(denoiser.module_shapes()).modules
    found = change_factors(swapped.changes(), denoiser.module_shapes())
    assert set(found.modules) == {name for name in truth if name.startswith("unet.")}
    assert {DOWN, CONV, ATTENTION} < set(found.modules)
    found = found.resolve(denoiser.module_shapes())
    for name, module in found.modules.items():
        torch.testing.assert_close(module.delta(), truth[name].delta(), atol=1e-5, rtol=1e-4)
    delta = torch.randn(40, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    name = "unet.x"
    module = change_factors([(f"{name}.weight", delta), (f"{name}.bias", delta[0, 0, 0]),
                             ("text_encoder.y.weight", delta[..., 0, 0])],
                            {name: (40, 5, 3, 3), "text_encoder.y": (40, 5)}).modules  # fmt: skip
    assert list(module) == [name] and module[name].rank == CHANGE_RANK == 16
    u, s, v = torch.linalg.svd(delta.flatten(1).double())
    best = (u[:, :16] * s[:16]) @ v[:16]
    torch.testing.assert_close(module[name].delta().flatten(1).double(), best, atol=1e-5, rtol=1e-5)


def test_no_matrix_of_the_unet_changed(base_folder, denoiser, sides, tmp_path):
    folder = shutil.copytree(base_folder, tmp_path / "m")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if name.endswith(".bias"):
            tensors[name] += 0.1
    save_file(tensors, path)
    found = audited(denoiser, folder, sides)[0]["membership"]
    assert {"gsa1", "gsa2", "adaptive"} < set(found["skipped"])
    assert "a matrix of the UNet" in found["skipped"]["gsa1"] and "calibrated" in found["attacks"]


def test_cached_answers_are_of_this_model(pair, denoiser, sides):
    """Another model under the same path is asked anew; the same is not."""
    _, model = pair
    first = audited(denoiser, model, sides, attacks="calibrated", cache=True)[1]["scores"]
    again = audited(denoiser, model, sides, attacks="calibrated", cache=True)[1]["scores"]
    assert again == first
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v + 0.01 for k, v in load_file(path).items()}, path)
    other = audited(denoiser, model, sides, attacks="calibrated", cache=True)[1]["scores"]
    assert other != first
    fresh = audited(denoiser, model, sides, attacks="calibrated")[1]["scores"]
    np.testing.assert_allclose(other["calibrated"], fresh["calibrated"], rtol=1e-5)


# --- without pictures ----------------------------------------------------------------------------------


def question(report):
    return next(q for q in report["questions"] if q["id"] == "metadata")


def test_a_folder_has_no_training_header(pair, tmp_path):
    _, model = pair
    report, each = audit_lora(None, model, None)
    assert validate_report(report) == [] and each is None and report["leaks"] == []
    told = question(report)
    assert told["level"] == "none_shown" and "has no training header" in told["statement"]
    assert report["subject"]["modules"] is None and report["subject"]["parameters"] is None
    page, _ = write_report(report, None, tmp_path / "out")
    assert "no base was given" in page.read_text()


def test_what_a_folder_does_tell(pair):
    _, model = pair
    config = json.loads((model / "unet" / "config.json").read_text())
    config["_name_or_path"] = "/home/somebody/portraits/base"
    (model / "unet" / "config.json").write_text(json.dumps(config))
    path = model / "text_encoder" / "model.safetensors"
    save_file(load_file(path), path, {"format": "pt", "ss_tag_frequency": '{"5_sks": {"sks": 5}}'})
    (model / "sample.png").write_bytes(b"")
    report, _ = audit_lora(None, model, None)
    assert {leak["key"] for leak in report["leaks"]} == {
        "unet/config.json", "text_encoder/model.safetensors:ss_tag_frequency", "sample.png"
    }  # fmt: skip
    assert question(report)["level"] == "high" and "folder carries 3 entries" in question(report)["statement"]  # fmt: skip
    assert "by hand" in question(report)["advice"][0]
    assert report["overall"]["headline"].startswith("The model's folder spells out")


def test_the_header_of_a_single_file(tiny_pipeline, tmp_path):
    tensors = ldm_checkpoint(tiny_pipeline())
    save_file(tensors, tmp_path / "clean.safetensors", {"format": "pt"})
    report, _ = audit_lora(None, tmp_path / "clean.safetensors", None)
    assert question(report)["statement"].startswith("Header: nothing found")
    header = {"ss_tag_frequency": '{"5_sks": {"sks": 5}}', "ss_steps": "10"}
    save_file(tensors, tmp_path / "told.safetensors", header)
    report, _ = audit_lora(None, tmp_path / "told.safetensors", None)
    assert {leak["key"] for leak in report["leaks"]} == set(header)
    assert report["overall"]["headline"] == "The file's header spells out details of the training data."  # fmt: skip
    torch.save({"state_dict": tensors}, tmp_path / "x.ckpt")
    report, _ = audit_lora(None, tmp_path / "x.ckpt", None)
    assert "x.ckpt is a pickle" in report["provenance"]["notes"][0]


def test_exposure_is_that_of_the_right_run(pair, tmp_path):
    from diffward.report.subject import open_audited

    lora, model = pair
    run = {"passes_per_picture": 7, "steps": 9}
    for tune, whose in (("full", model), ("lora", lora)):
        told = json.dumps({**run, "settings": {"tune": tune}})
        (lora.parent / "run.json").write_text(told)
        (model.parent / "run.json").write_text(told)
        for path in (lora, model, model / "unet"):
            right = (path == lora) == (whose == lora)
            assert (open_audited(path).exposure() is not None) == right


# --- wrong input ---------------------------------------------------------------------------------------


def test_wrong_input(pair, denoiser, sides, base_folder):
    _, model = pair
    with pytest.raises(InputError, match="--shadows 4: shadows are LoRAs"):
        audited(denoiser, model, sides, shadows=4)
    with pytest.raises(InputError, match="nothing was fine-tuned"):
        audited(denoiser, base_folder, sides)


def failed(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    told = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in told
    return told


def test_commands_point_the_right_way(pair, capsys, tmp_path, picture_folder):
    _, model = pair
    for path in (model, model / "unet"):
        assert f"is a full model, not a LoRA; diffward audit {path}" in failed(capsys, "inspect", path)  # fmt: skip
    told = failed(capsys, "audit", model.parent, "--out", tmp_path / "x")
    assert f"give {model}" in told
    told = failed(capsys, "audit", model, "--shadows", "4", "--out", tmp_path / "x")
    assert "shadows are LoRAs" in told and not (tmp_path / "x").exists()
    assert "no such file" in failed(capsys, "inspect", tmp_path / "nothing")


@pytest.mark.slow
def test_train_full_and_audit(tmp_path, monkeypatch):
    from diffward.models.mini import world
    from diffward.models.mini.attributes import Person

    person = Person.random(np.random.default_rng(5))
    world.save_folder(world.portraits(person, 16, 11, name="sks"), tmp_path / "p")

    def run(*args):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in args])
        assert not stop.value.code

    out = tmp_path / "run"
    few = ["--steps", "40", "--lr", "1e-3", "--batch", "4"]
    run("train", tmp_path / "p", "--tune", "full", "--holdout", "0.5", *few, "--out", out)
    given = ["--data", tmp_path / "p", "--split", out / "split.json", "--pairs", "4"]
    run("audit", out / "pipeline", "--base", "mini", *given, "--out", tmp_path / "a")
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert validate_report(report) == [] and report["leaks"] == []
    assert report["subject"]["format"] == "full model" and report["subject"]["modules"] > 100
    assert {"calibrated", "clid", "gsa1", "adaptive"} < set(report["membership"]["attacks"])
    assert report["membership"]["exposure"]["steps"] == 40
    # 20 passes over 8 pictures are remembered.
    assert report["membership"]["attacks"]["calibrated"]["auc"] > 0.8
