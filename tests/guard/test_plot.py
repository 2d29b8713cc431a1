"""Where a mask freezes: every tensor in its cell, sums that a loop confirms, colours that follow the share."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffward.guard.mask import Entry, FreezeMask
from diffward.guard.plot import block_of, draw_mask, kind_of, shares


def shapes_of(**config: Any) -> dict[str, tuple[int, ...]]:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return {n: tuple(p.shape) for n, p in UNet2DConditionModel(**config).named_parameters()}


def mask_of(shapes: dict[str, tuple[int, ...]], frozen: Any) -> FreezeMask:
    return FreezeMask({n: Entry(s, bool(frozen(n)), 0.0, {}) for n, s in shapes.items()})


@pytest.fixture(scope="module")
def sd15() -> dict[str, tuple[int, ...]]:
    """Stable Diffusion 1.5's UNet, without its weights."""
    return shapes_of(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


@pytest.fixture(scope="module")
def small() -> dict[str, tuple[int, ...]]:
    return shapes_of(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=2, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=2,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


T = "transformer_blocks.0"


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("conv_in.weight", "in", "conv"), ("conv_in.bias", "in", "bias"),
        ("time_embedding.linear_1.weight", "in", "time"),
        (f"down_blocks.0.attentions.1.{T}.attn1.to_q.weight", "down.0", "attn1 q"),
        (f"down_blocks.2.attentions.0.{T}.attn2.to_out.0.weight", "down.2", "attn2 out"),
        (f"down_blocks.2.attentions.0.{T}.attn2.to_out.0.bias", "down.2", "bias"),
        (f"mid_block.attentions.0.{T}.ff.net.0.proj.weight", "mid", "ff"),
        (f"mid_block.attentions.0.{T}.norm2.bias", "mid", "norm"),
        ("mid_block.attentions.0.norm.weight", "mid", "norm"), ("mid_block.attentions.0.proj_in.weight", "mid", "proj"),
        ("down_blocks.1.resnets.0.norm1.weight", "down.1", "norm"),
        ("down_blocks.1.resnets.0.time_emb_proj.weight", "down.1", "time"),
        ("down_blocks.1.resnets.0.conv_shortcut.weight", "down.1", "conv"),
        ("down_blocks.1.downsamplers.0.conv.weight", "down.1", "conv"),
        ("up_blocks.10.resnets.2.conv2.weight", "up.10", "conv"),
        ("conv_norm_out.weight", "out", "norm"), ("conv_out.weight", "out", "conv"),
        ("class_embedding.weight", "in", "other"),
    ],
)  # fmt: skip
def test_a_tensor_has_its_place(name: str, block: str, kind: str) -> None:
    assert (block_of(name), kind_of(name)) == (block, kind)


def test_blocks_come_in_the_order_of_execution(sd15: dict[str, tuple[int, ...]]) -> None:
    blocks, kinds, counts = shares(mask_of(sd15, lambda name: False))
    assert blocks == [
        "in", "down.0", "down.1", "down.2", "down.3", "mid", "up.0", "up.1", "up.2", "up.3", "out", "all",
    ]  # fmt: skip
    assert "other" not in kinds and kinds[-1] == "all"
    assert counts[-1, -1].tolist() == [0, 686, 0, 859_520_964]
    # 16 transformer blocks, each with one of these.
    for kind in kinds[:8]:
        assert counts[-1, kinds.index(kind), 1] == 16
    many = shapes_of(
        sample_size=8, layers_per_block=1, block_out_channels=(4,) * 11, norm_num_groups=2,
        down_block_types=("DownBlock2D",) * 11, up_block_types=("UpBlock2D",) * 11, attention_head_dim=2,
        cross_attention_dim=4,
    )  # fmt: skip
    assert shares(mask_of(many, lambda name: False))[0][10:13] == ["down.9", "down.10", "mid"]


def test_counts_are_those_of_a_loop(small: dict[str, tuple[int, ...]]) -> None:
    mask = mask_of(small, lambda name: len(name) % 3 == 0)
    blocks, kinds, counts = shares(mask)
    for r, block in enumerate(blocks):
        for c, kind in enumerate(kinds):
            inside = [
                e for n, e in mask.tensors.items()
                if block in ("all", block_of(n)) and kind in ("all", kind_of(n))
            ]  # fmt: skip
            held = sum(int(np.prod(e.shape)) for e in inside if e.frozen)
            assert counts[r, c].tolist() == [
                sum(e.frozen for e in inside), len(inside), held, sum(int(np.prod(e.shape)) for e in inside),
            ]  # fmt: skip


@pytest.mark.parametrize("base", ["sd15", "small"])
def test_the_picture_is_dark_where_it_freezes(
    base: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    shapes = request.getfixturevalue(base)
    levels = {}
    for name, frozen in (
        ("none", lambda n: False), ("up", lambda n: n.startswith("up_blocks")), ("most", lambda n: n != "conv_in.weight"),
    ):  # fmt: skip
        draw_mask(mask_of(shapes, frozen), tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as picture:
            # Without the colour bar at the right and the title above.
            whole = np.asarray(picture.convert("L"), dtype=float)
            cells = whole[int(0.15 * len(whole)) :, : int(0.88 * whole.shape[1])]
            levels[name] = [half.mean() for half in np.array_split(cells, 2)]
            assert picture.width >= 1200 and picture.height >= 600
    assert levels["none"][0] > 220 and levels["most"][0] < 170
    # Rows go down the page as the picture goes through the UNet.
    upper, lower = (levels["none"][i] - levels["up"][i] for i in (0, 1))
    assert lower > 4 * max(upper, 1)


def test_a_picture_that_cannot_be_written_is_not_there(
    small: dict[str, tuple[int, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    def full(figure: Figure, path: Path, **given: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space"):
        draw_mask(mask_of(small, lambda name: True), tmp_path / "mask.png")
    assert not list(tmp_path.iterdir())
