"""Other people's trainers under a mask: the page's snippets are run as they stand, and `verify` looks at the result."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffward.errors import InputError, TrainingError
from diffward.guard import FreezeMask
from diffward.guard.apply import (
    freeze,
    kohya_excluded,
    kohya_pattern,
    lora_targets,
    restore,
    strip_lora,
    watch,
    write_guarded,
)
from diffward.guard.verify import verify

from .masked import CONV, FREE, WEIGHTS, Q, edited, is_frozen, lora_file, mask_of

PAGE = Path(__file__).parents[2] / "docs" / "guard-enforce.md"
HEAD, DIFFUSERS, ACCELERATE, PEFT, KOHYA, STRIP, RESTORE, VERIFY = re.findall(
    r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
)


def loss_of(unet, batch):
    out = unet(batch, torch.tensor([10] * len(batch)), torch.ones(len(batch), 3, 16)).sample
    return ((out - 1) ** 2).mean()


@pytest.fixture
def place(denoiser, tmp_path, monkeypatch):
    """A working folder with a guarded base in it, as the page has it."""
    monkeypatch.chdir(tmp_path)
    write_guarded(denoiser, mask_of(denoiser.unet), None, tmp_path / "guarded")
    return tmp_path


@pytest.fixture
def names(place):
    """What the snippets take for granted, and the page's first lines."""
    g = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 4, 8, 8, generator=g) for _ in range(3)]
    scope = {
        "loss_of": loss_of,
        "batches": batches,
        "vae": None,
        "text_encoder": torch.nn.Linear(2, 2),
    }
    exec(HEAD, scope)
    return scope


def changed(unet, mask):
    """Which tensors of the UNet are not bit for bit those of the guarded base."""
    base = load_file(Path("guarded") / "unet" / WEIGHTS)
    own = {n.replace(".base_layer", ""): p for n, p in unet.named_parameters() if ".lora_" not in n}
    assert own.keys() == base.keys() == mask.tensors.keys()
    return {n for n, p in own.items() if not torch.equal(p, base[n])}


@pytest.mark.parametrize("loop", [DIFFUSERS, ACCELERATE])
def test_full_fine_tuning(names, loop):
    exec(loop, names)
    unet, mask = names["unet"], names["mask"]
    # Everything that trains has moved, and nothing else.
    assert changed(unet, mask) == {n for n in mask.tensors if not is_frozen(n)}
    assert not any(p.grad is not None for n, p in unet.named_parameters() if is_frozen(n))
    unet.save_pretrained("tuned")
    assert verify("guarded", "tuned", mask).ok
    # Without the mask the same loop moves frozen tensors: the test could fail.
    exec(HEAD, names)
    names["freeze"] = lambda unet, mask: list(unet.parameters())
    names["watch"] = lambda unet, mask, optimizer: __import__("contextlib").nullcontext()
    exec(loop, names)
    assert changed(names["unet"], mask) == set(mask.tensors)


def test_peft(names):
    exec(PEFT, names)
    unet, mask = names["unet"], names["mask"]
    on = {n.split(".lora_")[0] for n, _ in unet.named_parameters() if ".lora_" in n}
    attention = re.compile(r"attn\d\.to_(q|k|v|out\.0)\.weight$")
    assert on == {
        n.removesuffix(".weight") for n in mask.tensors if attention.search(n) and not is_frozen(n)
    }
    exec(DIFFUSERS.split("\n", 1)[1], names)
    assert changed(unet, mask) == set()
    up = next(p for n, p in unet.named_parameters() if ".lora_B" in n)
    assert up.abs().max() > 0
    unet.save_lora_adapter("adapter")
    verdict = verify("guarded", "adapter", mask)
    assert verdict.ok and verdict.checked == len(on)


class KohyaModule(torch.nn.Module):
    """A LoRA in the way of kohya's scripts: it takes the forward pass of the module it is made for."""

    def __init__(self, name, module, rank):
        super().__init__()
        self.lora_name, self.org_module = name, [module]
        conv = isinstance(module, torch.nn.Conv2d)
        out, inner = module.weight.shape[:2]
        if conv:
            self.lora_down = torch.nn.Conv2d(
                inner, rank, module.kernel_size, module.stride, module.padding, bias=False
            )
            self.lora_up = torch.nn.Conv2d(rank, out, 1, bias=False)
        else:
            self.lora_down = torch.nn.Linear(inner, rank, bias=False)
            self.lora_up = torch.nn.Linear(rank, out, bias=False)
        torch.nn.init.zeros_(self.lora_up.weight)
        self.register_buffer("alpha", torch.tensor(float(rank)))

    def apply_to(self):
        forward = self.org_module[0].forward
        self.org_module[0].forward = lambda x, *args: forward(x) + self.lora_up(self.lora_down(x))


class KohyaNetwork(torch.nn.Module):
    def __init__(self, unet, rank):
        super().__init__()
        self.unet_loras = [
            KohyaModule("lora_unet." .replace(".", "_") + name.replace(".", "_"), module, rank)
            for name, module in unet.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        ]  # fmt: skip

    def apply_to(self, text_encoder, unet, apply_text_encoder=True, apply_unet=True):
        for lora in self.unet_loras:
            lora.apply_to()
            self.add_module(lora.lora_name, lora)


def test_kohya(names):
    names["network_module"] = SimpleNamespace(
        create_network=lambda m, rank, alpha, v, t, unet: KohyaNetwork(unet, rank)
    )
    exec(KOHYA, names)
    unet, mask, network = names["unet"], names["mask"], names["network"]
    unet.requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for batch in names["batches"]:
        loss_of(unet, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, "lora.safetensors")
    verdict = verify("guarded", "lora.safetensors", mask)
    kernels = {n for n, e in mask.tensors.items() if len(e.shape) > 1}
    assert verdict.ok and verdict.checked == len({n for n in kernels if not is_frozen(n)})

    # One that left nothing out is found, and clean once it is stripped.
    exec(HEAD, names)
    whole = KohyaNetwork(names["unet"], 2)
    whole.apply_to(None, None)
    for lora in whole.unet_loras:
        torch.nn.init.normal_(lora.lora_up.weight)
    save_file({k: v.contiguous() for k, v in whole.state_dict().items()}, "lora.safetensors")
    verdict = verify("guarded", "lora.safetensors", mask)
    assert {m.name for m in verdict.moved} == {n for n in kernels if is_frozen(n)}
    exec(STRIP, names)
    assert verify("guarded", "stripped.safetensors", mask).ok
    kept, given = load_file("stripped.safetensors"), load_file("lora.safetensors")
    excluded = set(kohya_excluded(names["unet"], mask))
    assert kept.keys() == {k for k in given if k.split(".")[0] not in excluded}
    assert all(torch.equal(kept[k], given[k]) for k in kept)


def test_pattern_for_kohya_matches_just_the_frozen_modules(names):
    unet, mask = names["unet"], names["mask"]
    pattern, excluded = re.compile(kohya_pattern(unet, mask)), set(kohya_excluded(unet, mask))
    modules = [
        n for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)
    ]
    assert any(is_frozen(f"{n}.weight") for n in modules)
    for name in modules:
        ours = f"lora_unet_{name.replace('.', '_')}"
        frozen = is_frozen(f"{name}.weight")
        assert (
            bool(pattern.fullmatch(name))
            == bool(pattern.fullmatch(ours))
            == (ours in excluded)
            == frozen
        )
        assert not pattern.fullmatch(f"{name}.0")
    # It is passed through a list in text.
    assert __import__("ast").literal_eval(str([pattern.pattern])) == [pattern.pattern]


def test_restore_and_verify(names, capsys):
    def spoil(tensors):
        tensors[f"{Q}.weight"] += 1
        tensors["conv_in.bias"] = tensors["conv_in.bias"] * 1.5 + 1
        tensors[f"{FREE}.weight"] += 1

    edited(Path("guarded"), Path("candidate"), spoil)
    exec(VERIFY, names)
    told = capsys.readouterr().out
    assert not names["verdict"].ok and "2 of" in told and f"{Q}.weight: low rank (1)" in told
    exec(RESTORE, names)
    exec(VERIFY, names)
    assert names["verdict"].ok
    # What trains stays as it was trained.
    base, now = (load_file(f"{p}/unet/{WEIGHTS}") for p in ("guarded", "candidate"))
    assert torch.equal(now[f"{FREE}.weight"], base[f"{FREE}.weight"] + 1)
    unet, mask = names["unet"], names["mask"]
    unet.conv_in.bias.data += 1
    assert restore(unet, base, mask) == ["conv_in.bias"]
    assert restore(unet, "guarded", mask) == []


def test_restore_wants_the_base(names):
    unet, mask = names["unet"], names["mask"]
    base = load_file(f"guarded/unet/{WEIGHTS}")
    last = mask.frozen[-1]
    before = {n: p.detach().clone() for n, p in unet.named_parameters()}
    unet.conv_in.bias.data += 1
    for wrong in ({**base, last: base[last] + 1}, {n: t for n, t in base.items() if n != last}):
        with pytest.raises(InputError, match=f"{re.escape(last)} is not that of the base"):
            restore(unet, wrong, mask)
    assert torch.equal(unet.conv_in.bias, before["conv_in.bias"] + 1)


# --- what goes wrong ---------------------------------------------------------------------------------


def test_watch_stops_a_loop_that_does_not_keep_to_the_mask(names):
    unet, mask, batch = names["unet"], names["mask"], names["batches"][0]
    with pytest.raises(TrainingError, match="is frozen and gets a gradient"):
        watch(unet, mask, torch.optim.AdamW(unet.parameters()))
    trainable = freeze(unet, mask)
    with pytest.raises(TrainingError, match="in the optimizer"):
        watch(unet, mask, torch.optim.AdamW(unet.parameters()))
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    keeper = watch(unet, mask, optimizer)
    # Someone thaws a tensor in the middle of training: the next step is not made.
    free = unet.get_parameter(f"{FREE}.weight")
    before = free.detach().clone()
    unet.get_parameter(f"{Q}.weight").requires_grad_(True)
    loss_of(unet, batch).backward()
    with pytest.raises(TrainingError, match=re.escape(f"{Q}.weight is frozen and gets a gradient")):
        optimizer.step()
    assert torch.equal(free, before)
    unet.get_parameter(f"{Q}.weight").requires_grad_(False).grad = None
    optimizer.step()
    assert not torch.equal(free, before)
    keeper.check()
    # One bit of one value.
    unet.get_parameter(f"{CONV}.weight").data.view(torch.int32)[0, 0, 0, 0] ^= 1
    with pytest.raises(TrainingError, match=re.escape(f"{CONV}.weight is frozen and has moved")):
        keeper.check()
    with pytest.raises(TrainingError, match="has moved"), watch(unet, mask):
        unet.conv_in.bias.data += 1
    with pytest.raises(KeyError), watch(unet, mask):
        unet.conv_in.bias.data += 1
        raise KeyError  # the first error is the one that is told


def test_freeze_turns_nothing_on(names):
    unet, mask = names["unet"], names["mask"]
    unet.requires_grad_(False)
    with pytest.raises(InputError, match="nothing is left to train"):
        freeze(unet, mask)
    unet.conv_out.requires_grad_(True)
    unet.conv_in.requires_grad_(True)
    assert [id(p) for p in freeze(unet, mask)] == [
        id(unet.conv_in.weight),
        *map(id, unet.conv_out.parameters()),
    ]


def test_freeze_refuses_a_lora_on_a_frozen_module(names):
    from peft import LoraConfig

    unet, mask = names["unet"], names["mask"]
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(InputError, match="carries a LoRA but is frozen"):
        freeze(unet, mask)


def test_targets(names):
    unet, mask = names["unet"], names["mask"]
    assert lora_targets(unet, mask, ["conv_in"]) == ["conv_in"]  # only its bias is frozen
    assert all(n.endswith("to_k") and not is_frozen(n) for n in lora_targets(unet, mask, ["to_k"]))
    assert FREE in lora_targets(unet, mask, "text")
    with pytest.raises(InputError, match="freezes each of the 1 modules"):
        lora_targets(unet, mask, [Q])
    with pytest.raises(InputError, match="is called to_nothing"):
        lora_targets(unet, mask, "to_nothing")


def test_another_models_mask(names, tiny_pipeline):
    other = tiny_pipeline(block_out_channels=(8, 8)).unet
    for call in (freeze, watch, kohya_excluded, lambda u, m: lora_targets(u, m, "all"),
                 lambda u, m: restore(u, "guarded", m)):  # fmt: skip
        with pytest.raises(InputError, match="it is for another model"):
            call(other, names["mask"])


def test_strip_keeps_the_layout(names):
    mask = names["mask"]
    shapes = {f"unet.{n}": mask.tensors[f"{n}.weight"].shape for n in (Q, FREE)}
    text = "text_encoder.encoder.layers.0.self_attn.q_proj"
    for form in ("diffusers", "peft", "kohya"):
        suffix = "" if form == "peft" else ".safetensors"
        path = lora_file(Path(f"{form}{suffix}"), {**shapes, text: (16, 16)}, 2, form)
        out = Path(f"out-{form}{suffix}")
        assert strip_lora(path, mask, out) == [Q]
        from diffward.lora import open_lora

        before, after = open_lora(path), open_lora(out)
        assert after.format == before.format
        assert after.entries.keys() == {f"unet.{FREE}", text}
        with pytest.raises(InputError, match="would overwrite"):
            strip_lora(path, mask, path)
    alone = lora_file(Path("alone.safetensors"), {f"unet.{Q}": shapes[f"unet.{Q}"]})
    with pytest.raises(InputError, match="nothing is left"):
        strip_lora(alone, mask, "none.safetensors")
    assert not Path("none.safetensors").exists()


# --- publishing --------------------------------------------------------------------------------------


def test_guarded_folder(names, denoiser):
    from diffusers import StableDiffusionPipeline

    mask = FreezeMask.load("guarded/mask.json")
    assert mask.tensors == mask_of(denoiser.unet).tensors
    assert verify("guarded", "guarded", mask).ok
    assert StableDiffusionPipeline.from_pretrained("guarded").unet is not None
    card = Path("guarded/README.md").read_text()
    assert mask.told() in card and "advisory" in card and "guard verify" in card
    rows = dict(re.findall(r"\| `(.+?)` \| (\d+) of", card))
    assert sum(map(int, rows.values())) == len(mask.frozen) and rows["conv_in"] == "1"


@pytest.mark.parametrize("learned_on", ["base", "edited"])
def test_guarded_folder_of_an_edited_base(denoiser, tmp_path, learned_on):
    before = {n: p.detach().clone() for n, p in denoiser.unet.named_parameters()}
    edit = {f"{n}.weight": before[f"{n}.weight"] * 1.1 for n in (Q, FREE)}
    weights = {**before, **edit} if learned_on == "edited" else before
    mask = FreezeMask.of(
        weights, [is_frozen(n) for n in weights], [0.0] * len(weights), {"method": "uce"}
    )
    written = write_guarded(denoiser, mask, edit, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "unet" / WEIGHTS)
    for name, tensor in before.items():
        assert torch.equal(saved[name], edit.get(name, tensor))
        assert torch.equal(denoiser.unet.get_parameter(name), tensor)
    assert FreezeMask.load(tmp_path / "out" / "mask.json").tensors == written.tensors
    assert written.frozen == mask.frozen
    written.check_base(saved, "the folder")
    assert verify(tmp_path / "out", tmp_path / "out", written).ok
    assert json.loads((tmp_path / "out" / "mask.json").read_text())["edited_tensors"] == 2
    assert "2 tensors were edited" in (tmp_path / "out" / "README.md").read_text()


def test_what_cannot_be_published(denoiser, tiny_denoiser, tmp_path):
    mask, out = mask_of(denoiser.unet), tmp_path / "out"
    with pytest.raises(InputError, match="has other values than the base"):
        write_guarded(tiny_denoiser(seed=1), mask, None, out)
    for edit in ({"nothing": torch.ones(1)}, {"conv_in.bias": torch.ones(3)}):
        with pytest.raises(InputError, match="is not a tensor of base"):
            write_guarded(denoiser, mask, edit, out)
    denoiser.inject(2, 2, ["to_q"], text_encoder=False)
    with pytest.raises(InputError, match="carries a LoRA"):
        write_guarded(denoiser, mask, None, out)
    denoiser.detach()
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="no diffusers folder"):
        write_guarded(denoiser, mask, None, out)
    assert (out / "notes.txt").read_text() == "mine"


def test_nothing_half_written(denoiser, tmp_path, monkeypatch):
    mask, out = mask_of(denoiser.unet), tmp_path / "out"
    write_guarded(denoiser, mask, None, out)
    shutil.copytree(out, tmp_path / "copy")
    bias = denoiser.unet.conv_in.bias.detach().clone()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FreezeMask, "save", full)
    with pytest.raises(OSError, match="No space"):
        write_guarded(denoiser, mask, {"conv_in.bias": bias + 1}, out)
    assert torch.equal(denoiser.unet.conv_in.bias, bias)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == ["copy", "out"]
    for file in (tmp_path / "copy").rglob("*.*"):
        if file.is_file():
            assert (out / file.relative_to(tmp_path / "copy")).read_bytes() == file.read_bytes()
