"""`verify`: what moved is named with how it moved, and nothing else is."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffward.errors import InputError
from diffward.guard.lowrank import low_rank
from diffward.guard.verify import verify

from ..models.single_file import _unet, ldm_checkpoint
from .masked import CONV, FREE, WEIGHTS, Q, edited, is_frozen, lora_file, mask_of


@pytest.fixture(scope="module")
def mask(tiny_pipeline):
    return mask_of(tiny_pipeline().unet)


@pytest.fixture(scope="module")
def wide(tiny_pipeline, tmp_path_factory):
    """A base with matrices large enough for ranks: (folder, mask)."""
    pipe = tiny_pipeline(block_out_channels=(32, 64))
    folder = tmp_path_factory.mktemp("wide") / "base"
    pipe.save_pretrained(folder)
    return folder, mask_of(pipe.unet)


def found(verdict):
    return {moved.name: moved.kind for moved in verdict.moved}


def cast_to(dtype):
    def edit(tensors):
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)

    return edit


def refused(words, *args):
    with pytest.raises(InputError) as error:
        verify(*args)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_base_itself_and_what_trains(base_folder, mask, tmp_path):
    verdict = verify(base_folder, base_folder, mask)
    assert verdict.ok and verdict.cast is None and verdict.notes == []
    assert verdict.checked == verdict.frozen == sum(map(is_frozen, mask.tensors))

    def train(tensors):
        for name in tensors:
            if not is_frozen(name):
                tensors[name] += torch.randn_like(tensors[name])

    assert verify(base_folder, edited(base_folder, tmp_path / "x", train), mask).ok


@pytest.mark.parametrize("up_again", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casts_pass_and_are_told(base_folder, mask, tmp_path, dtype, up_again):
    def edit(tensors):
        cast_to(dtype)(tensors)
        if up_again:
            cast_to(torch.float32)(tensors)

    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    rounded = edited(base_folder, tmp_path / "x", edit)
    verdict = verify(base_folder, rounded, mask)
    assert verdict.ok and verdict.cast == name
    assert name in verdict.told()[0]
    # The same as the base: the mask's own hashes accept it, and the exact one as candidate.
    assert verify(rounded, base_folder, mask).cast is None
    assert verify(rounded, rounded, mask).cast == name


def test_rounded_twice_and_to_8_bits(base_folder, mask, tmp_path):
    def twice(tensors):
        cast_to(torch.float16)(tensors)
        cast_to(torch.bfloat16)(tensors)

    # The test could not fail if rounding twice were the same as once.
    plain = load_file(base_folder / "unet" / WEIGHTS)
    assert any(
        not torch.equal(t.half().bfloat16(), t.bfloat16()) for n, t in plain.items() if is_frozen(n)
    )
    verdict = verify(base_folder, edited(base_folder, tmp_path / "x", twice), mask)
    assert verdict.ok and "fp16 to bf16" in (verdict.cast or "")
    verdict = verify(
        base_folder, edited(base_folder, tmp_path / "8", cast_to(torch.float8_e4m3fn)), mask
    )
    assert verdict.ok and verdict.cast == "float8_e4m3fn"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_ulp_in_one_entry_is_found(base_folder, mask, tmp_path, dtype):
    step = {}

    def edit(tensors):
        cast_to(dtype)(tensors)
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        value = tensors[f"{CONV}.weight"].flatten()
        before = value[7].item()
        value.view(bits)[7] += 1
        step["size"] = abs(value[7].item() - before)
        tensors[f"{CONV}.weight"] = value.view_as(tensors[f"{CONV}.weight"])

    verdict = verify(base_folder, edited(base_folder, tmp_path / "x", edit), mask)
    assert found(verdict) == {f"{CONV}.weight": "changed"}
    assert verdict.moved[0].max_abs == pytest.approx(step["size"], rel=1e-6)
    assert not verdict.ok and "1 of" in verdict.told()[0] and CONV in verdict.told()[1]
    assert json.loads(json.dumps(verdict.to_dict()))["moved"][0]["kind"] == "changed"


def test_every_moved_tensor_is_named(base_folder, mask, tmp_path):
    g = torch.Generator().manual_seed(1)

    def train(tensors):
        for name in tensors:
            tensors[name] = tensors[name] + 1e-3 * torch.randn(tensors[name].shape, generator=g)

    verdict = verify(base_folder, edited(base_folder, tmp_path / "x", train), mask)
    assert [m.name for m in verdict.moved] == mask.frozen
    assert {m.kind for m in verdict.moved} == {"changed"}


def test_not_finite(base_folder, mask, tmp_path):
    def edit(tensors):
        tensors[f"{Q}.weight"][0, 0] = float("nan")

    verdict = verify(base_folder, edited(base_folder, tmp_path / "x", edit), mask)
    assert found(verdict) == {f"{Q}.weight": "changed"}
    assert "no longer finite" in verdict.told()[1]
    assert verdict.to_dict()["moved"][0]["max_abs"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 4])
def test_merged_lora_is_of_low_rank(wide, tmp_path, dtype, rank):
    folder, mask = wide
    g = torch.Generator().manual_seed(rank)

    def merge(tensors):
        for name in (f"{Q}.weight", f"{CONV}.weight", f"{FREE}.weight"):
            weight = tensors[name]
            rows = weight.flatten(1)
            delta = torch.randn(len(rows), rank, generator=g) @ torch.randn(
                rank, rows.shape[1], generator=g
            )
            # As large as a LoRA that works: a tenth of the weight.
            delta *= 0.1 * rows.norm() / delta.norm()
            tensors[name] = weight + delta.view_as(weight)
        cast_to(dtype)(tensors)

    verdict = verify(folder, edited(folder, tmp_path / "x", merge), mask)
    assert {(m.name, m.kind, m.rank) for m in verdict.moved} == {
        (f"{Q}.weight", "low rank", rank), (f"{CONV}.weight", "low rank", rank),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merged_lora_against_a_rounded_base(wide, tmp_path, dtype):
    folder, mask = wide

    def merge(tensors):
        weight = tensors[f"{CONV}.weight"]
        delta = torch.randn(len(weight), 3) @ torch.randn(3, weight[0].numel())
        weight += (0.1 * weight.norm() / delta.norm()) * delta.view_as(weight)
        cast_to(dtype)(tensors)

    rounded = edited(folder, tmp_path / "base", cast_to(torch.float16))
    merged = edited(folder, tmp_path / "merged", merge)
    verdict = verify(rounded, merged, mask)
    assert [(m.name, m.kind, m.rank) for m in verdict.moved] == [(f"{CONV}.weight", "low rank", 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 0.1])
def test_full_fine_tuning_is_not_low_rank(wide, tmp_path, dtype, size):
    # A few directions far above the rest, as gradients have them, and rounding that hides most of it.
    folder, mask = wide
    g = torch.Generator().manual_seed(0)

    def train(tensors):
        for name, weight in tensors.items():
            if weight.ndim > 1:
                rows = weight.flatten(1)
                delta = torch.randn(rows.shape, generator=g)
                delta += (
                    3
                    * torch.randn(len(rows), 1, generator=g)
                    @ torch.randn(1, rows.shape[1], generator=g)
                )
                tensors[name] = weight + (size * rows.norm() / delta.norm() * delta).view_as(weight)
        cast_to(dtype)(tensors)

    verdict = verify(folder, edited(folder, tmp_path / "x", train), mask)
    kinds = [m.kind for m in verdict.moved if len(mask.tensors[m.name].shape) > 1]
    assert len(kinds) > 30
    # By chance the rest of a small matrix may look like rounding.
    assert kinds.count("low rank") <= (0 if dtype == torch.float32 else 0.1 * len(kinds))


def test_ranks_above_a_quarter_are_not_low():
    g = torch.Generator().manual_seed(0)
    base = 0.05 * torch.randn(64, 48, 3, 3, generator=g)
    for rank, expected in ((15, 15), (16, 16), (17, None), (64, None)):
        delta = torch.randn(64, rank, generator=g) @ torch.randn(rank, 432, generator=g)
        assert low_rank(base, base + 0.002 * delta.view_as(base)) == expected
    # A tall matrix; and one that is zero but for a corner, which a look at some of its entries may miss.
    tall = torch.randn(200, 40, generator=g)
    assert (
        low_rank(tall, tall + torch.randn(200, 3, generator=g) @ torch.randn(3, 40, generator=g))
        == 3
    )
    corner = tall.clone()
    corner[:12, :12] += torch.randn(12, 12, generator=g)
    assert low_rank(tall, corner) is None
    assert low_rank(torch.ones(9), torch.zeros(9)) is None
    # Nothing but rounding.
    assert low_rank(base, base.half()) is None


LORAS = ["diffusers", "kohya", "peft"]


@pytest.mark.parametrize("form", LORAS)
def test_separate_lora(base_folder, mask, tmp_path, form):
    shapes = {n: mask.tensors[f"{n}.weight"].shape for n in (Q, CONV, FREE)}
    suffix = "" if form == "peft" else ".safetensors"
    both = lora_file(tmp_path / f"a{suffix}", {f"unet.{n}": s for n, s in shapes.items()}, 2, form)
    verdict = verify(base_folder, both, mask)
    assert {(m.name, m.kind, m.rank) for m in verdict.moved} == {
        (f"{Q}.weight", "adapter", 2), (f"{CONV}.weight", "adapter", 2),
    }  # fmt: skip
    assert verdict.checked == 3 and not verdict.whole
    from diffward.lora import open_lora

    delta = open_lora(both).load().modules[f"unet.{Q}"].delta()
    moved = next(m for m in verdict.moved if Q in m.name)
    assert moved.max_abs == pytest.approx(float(delta.abs().max()), rel=1e-6)

    text = {"text_encoder.encoder.layers.0.self_attn.q_proj": (16, 16)}
    fine = lora_file(tmp_path / f"b{suffix}", {f"unet.{FREE}": shapes[FREE], **text}, 2, form)
    verdict = verify(base_folder, fine, mask)
    assert (
        verdict.ok
        and "text encoder" in verdict.notes[0]
        and "none of its 1 modules" in verdict.told()[0]
    )


def test_numbered_lora(base_folder, mask, denoiser, tmp_path):
    # cloneofsimo's file: pairs in the order of its walk, here over all of attn1, ff, attn2 of three blocks.
    tensors, names = {}, []
    for side in ("down_blocks.0.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1",
                 "mid_block.attentions.0"):  # fmt: skip
        for part in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj",
                     "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"):  # fmt: skip
            names.append(f"{side}.transformer_blocks.0.{part}")
            out, inner = mask.tensors[f"{names[-1]}.weight"].shape
            i = len(names) - 1
            tensors[f"unet:{i}:up"], tensors[f"unet:{i}:down"] = (
                torch.randn(out, 1),
                torch.randn(1, inner),
            )
    save_file(tensors, tmp_path / "numbered.safetensors")
    verdict = verify(base_folder, tmp_path / "numbered.safetensors", mask)
    assert {m.name for m in verdict.moved} == {f"{n}.weight" for n in names if is_frozen(n)}


def test_a_lora_that_changes_nothing(base_folder, mask, tmp_path):
    path = lora_file(tmp_path / "a.safetensors", {f"unet.{Q}": mask.tensors[f"{Q}.weight"].shape})
    tensors = load_file(path)
    for key in tensors:
        if "lora_B" in key:
            tensors[key].zero_()
    save_file(tensors, path)
    verdict = verify(base_folder, path, mask)
    assert verdict.ok and "changes nothing" in verdict.notes[0]


def test_lora_inside_a_pipeline_folder(base_folder, mask, tmp_path):
    folder = shutil.copytree(base_folder, tmp_path / "x")
    lora_file(
        folder / "pytorch_lora_weights.safetensors",
        {f"unet.{Q}": mask.tensors[f"{Q}.weight"].shape},
    )
    assert found(verify(base_folder, folder, mask)) == {f"{Q}.weight": "adapter"}


# --- layouts -----------------------------------------------------------------------------------------


def test_unet_alone_as_folder_and_file(base_folder, mask, tmp_path):
    def edit(tensors):
        tensors["conv_in.bias"] += 1

    moved = edited(base_folder, tmp_path / "x", edit)
    prefixed = {f"unet.{k}": v for k, v in load_file(moved / "unet" / WEIGHTS).items()}
    save_file(prefixed, tmp_path / "prefixed.safetensors")
    for path in (moved / "unet", moved / "unet" / WEIGHTS, tmp_path / "prefixed.safetensors"):
        verdict = verify(base_folder / "unet", path, mask)
        assert found(verdict) == {"conv_in.bias": "changed"}
        assert verdict.moved[0].max_abs == pytest.approx(1, abs=1e-6)


def test_variants_and_shards_of_a_folder(base_folder, mask, tmp_path):
    folder = shutil.copytree(base_folder, tmp_path / "x") / "unet"
    tensors = load_file(folder / WEIGHTS)
    halves = dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])
    (folder / WEIGHTS).unlink()
    for i, half in enumerate(halves, 1):
        save_file(half, folder / f"diffusion_pytorch_model-0000{i}-of-00002.safetensors")
    assert verify(base_folder, folder, mask).ok
    # A variant that lies beside it is another way to load the model.
    half = {n: t.half() for n, t in tensors.items()}
    half[f"{Q}.weight"] = half[f"{Q}.weight"] * 2
    save_file(half, folder / "diffusion_pytorch_model.fp16.safetensors")
    verdict = verify(base_folder, folder, mask)
    assert [(m.name, m.copy) for m in verdict.moved] == [(f"{Q}.weight", "fp16")]
    assert "fp16" in verdict.told()[1]
    torch.save({n: t + 1 for n, t in tensors.items()}, folder / "diffusion_pytorch_model.bin")
    assert {m.copy for m in verify(base_folder, folder, mask).moved} == {"fp16", "bin"}


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_single_file_of_the_original_layout(base_folder, mask, tiny_pipeline, tmp_path, suffix):
    pipe = tiny_pipeline()
    path = tmp_path / f"model.{suffix}"

    def save(tensors):
        if suffix == "ckpt":
            torch.save({"state_dict": tensors}, path)
        else:
            save_file(tensors, path)

    save(ldm_checkpoint(pipe))
    assert verify(base_folder, path, mask).ok
    assert verify(path, base_folder, mask).ok
    assert verify(path, path, mask).notes == []
    # The truth about names comes from the writer of the tests, the other way round: each its own amount.
    for i, name in enumerate(mask.frozen):
        pipe.unet.get_parameter(name).data.add_(1 + i / 64)
    save(ldm_checkpoint(pipe))
    moved = verify(base_folder, path, mask).moved
    assert [m.name for m in moved] == mask.frozen
    assert [m.max_abs for m in moved] == pytest.approx(
        [1 + i / 64 for i in range(len(moved))], abs=1e-5
    )


def test_ema_beside_the_model(base_folder, mask, tiny_pipeline, tmp_path):
    pipe = tiny_pipeline()
    tensors = ldm_checkpoint(pipe)
    ema = {}
    for key in [k for k in tensors if k.startswith("model.diffusion_model.")]:
        ema["model_ema." + key.removeprefix("model.").replace(".", "")] = tensors[key].clone()
    path, own = (
        tmp_path / "model.safetensors",
        f"model.diffusion_model.{_unet(f'{Q}.weight', pipe.unet.config)}",
    )
    save_file({**tensors, **ema}, path)
    verdict = verify(base_folder, path, mask)
    assert verdict.ok and "ema" in verdict.notes[0] and verdict.checked == 2 * len(mask.frozen)
    ema["model_ema." + own.removeprefix("model.").replace(".", "")] += 0.5
    save_file({**tensors, **ema}, path)
    verdict = verify(base_folder, path, mask)
    assert found(verdict) == {f"{Q}.weight": "ema"}
    assert verdict.moved[0].max_abs == pytest.approx(0.5, rel=1e-5)
    # A base's own average is no violation.
    assert verify(path, path, mask).ok

    folder = shutil.copytree(base_folder, tmp_path / "x")
    shutil.copytree(folder / "unet", folder / "unet_ema")
    assert verify(base_folder, folder, mask).ok
    weights = load_file(folder / "unet_ema" / WEIGHTS)
    weights["conv_in.bias"] += 1
    save_file(weights, folder / "unet_ema" / WEIGHTS)
    assert found(verify(base_folder, folder, mask)) == {"conv_in.bias": "ema"}


def test_text_encoder_is_told_and_no_violation(base_folder, mask, tiny_pipeline, tmp_path):
    pipe = tiny_pipeline()
    half = shutil.copytree(base_folder, tmp_path / "half")
    pipe.text_encoder.half().save_pretrained(half / "text_encoder")
    assert verify(base_folder, half, mask).notes == []
    pipe = tiny_pipeline()
    next(iter(pipe.text_encoder.parameters())).data[0, 0] += 1
    other = shutil.copytree(base_folder, tmp_path / "other")
    pipe.text_encoder.save_pretrained(other / "text_encoder")
    single = tmp_path / "other.safetensors"
    save_file(ldm_checkpoint(pipe), single)
    for path in (other, single):
        verdict = verify(base_folder, path, mask)
        assert verdict.ok and "a bypass that the mask does not cover" in verdict.told()[-1]


def test_mini_is_a_base(mask):
    from diffward.guard import FreezeMask
    from diffward.guard.candidate import open_model
    from diffward.models.mini import PIPELINE

    weights = load_file(PIPELINE / "unet" / WEIGHTS)
    own = FreezeMask.of(
        weights, [n.startswith("mid_block") for n in weights], [0.0] * len(weights), {}
    )
    assert verify("mini", PIPELINE, own).ok
    assert len(open_model("mini", own).unet) == len(weights)


# --- wrong input -------------------------------------------------------------------------------------


def test_wrong_models(base_folder, mask, tiny_pipeline, wide, tmp_path):
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "seed")
    refused("has other values than the base", tmp_path / "seed", base_folder, mask)
    assert not verify(base_folder, tmp_path / "seed", mask).ok
    refused("it is for another model", base_folder, wide[0], mask)
    refused("it is for another model", wide[0], base_folder, mask)

    def lack(tensors):
        del tensors[f"{Q}.weight"]

    refused(
        f"has no tensor {Q}.weight", base_folder, edited(base_folder, tmp_path / "l", lack), mask
    )
    # A changed tensor of the base that trains is another base too.
    free = edited(base_folder, tmp_path / "f", lambda t: t[f"{FREE}.weight"].add_(1))
    refused(f"{FREE}.weight has other values", free, base_folder, mask)
    ldm = ldm_checkpoint(tiny_pipeline())
    lacking = {k: v for k, v in ldm.items() if "input_blocks.1.1." not in k}
    save_file(lacking, tmp_path / "lacking.safetensors")
    refused(
        "has no tensor down_blocks.0.attentions.0",
        base_folder,
        tmp_path / "lacking.safetensors",
        mask,
    )


def test_wrong_adapters(base_folder, mask, tmp_path):
    shape = mask.tensors[f"{FREE}.weight"].shape
    fine = lora_file(tmp_path / "a.safetensors", {f"unet.{FREE}": shape})
    refused("is an adapter; give the model", fine, base_folder, mask)
    sdxl = lora_file(tmp_path / "b.safetensors", {f"unet.{FREE}": (640, 2048)})
    refused("looks like SDXL", base_folder, sdxl, mask)
    flux = lora_file(
        tmp_path / "c.safetensors", {"transformer.single_transformer_blocks.0.proj_mlp": (12, 8)}
    )
    refused("it is for another model", base_folder, flux, mask)
    mixed = {
        **load_file(base_folder / "unet" / WEIGHTS),
        f"{Q}.lora_A.default.weight": torch.ones(2, 8),
    }
    save_file(mixed, tmp_path / "d.safetensors")
    refused("LoRA layer among the weights", base_folder, tmp_path / "d.safetensors", mask)


def test_files_that_are_nothing(base_folder, mask, tmp_path):
    whole = base_folder / "unet" / WEIGHTS
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-100])
    refused("truncated", base_folder, cut, mask)
    refused("truncated", cut, base_folder, mask)
    folder = shutil.copytree(base_folder, tmp_path / "x")
    shutil.copy(cut, folder / "unet" / WEIGHTS)
    refused("truncated", base_folder, folder, mask)
    (folder / "unet" / WEIGHTS).unlink()
    refused("holds no UNet", base_folder, folder, mask)
    refused("no such file or folder", base_folder, tmp_path / "none", mask)
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    refused("holds no UNet", base_folder, tmp_path / "other.safetensors", mask)
    (tmp_path / "notes.txt").write_text("hello, these are notes")
    refused("notes.txt", base_folder, tmp_path / "notes.txt", mask)
    tensors = {n: (t * 100).to(torch.int8) for n, t in load_file(whole).items()}
    save_file(tensors, tmp_path / "int.safetensors")
    refused("quantised", base_folder, tmp_path / "int.safetensors", mask)


def test_streams_both_models():
    from diffward.guard import FreezeMask
    from diffward.models.mini import PIPELINE

    file = PIPELINE / "unet" / WEIGHTS
    weights = load_file(file)
    largest = max(t.nbytes for t in weights.values())
    own = FreezeMask.of(weights, [True] * len(weights), [0.0] * len(weights), {})
    del weights
    verify(PIPELINE, PIPELINE, own)  # what is imported late is no part of it
    # What is read lies in Python's own buffers.
    tracemalloc.start()
    assert verify(PIPELINE, PIPELINE, own).checked == len(own.tensors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * largest + 2**20 < file.stat().st_size


def test_paths_may_be_texts(base_folder: Path, mask):
    assert verify(str(base_folder), str(base_folder), mask).to_dict()["ok"] is True
