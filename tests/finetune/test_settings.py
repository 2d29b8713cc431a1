from __future__ import annotations

import math

import pytest

from diffward.errors import InputError
from diffward.finetune import METHODS, Settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": 0},
        {"accumulate": 0},
        {"rank": 0},
        {"checkpoint_every": 0},
        {"steps": -1},
        {"epochs": 0},
        {"epochs": math.nan},
        {"lr": 0},
        {"lr": -1e-3},
        {"lr": math.nan},
        {"schedule": "linear"},
        {"tune": "dreambooth"},
        {"track": "wandb"},
        {"drop_caption": 1.0},
        {"drop_caption": -0.1},
    ],
)
def test_wrong_settings_name_the_option(wrong):
    with pytest.raises(InputError, match="--" + next(iter(wrong)).replace("_", "-")):
        Settings(**wrong)


def test_rates():
    constant = Settings(lr=0.1)
    assert [constant.rate(i, 10) for i in (0, 5, 9)] == [0.1] * 3
    warm = Settings(lr=0.1, warmup=4)
    assert [warm.rate(i, 10) for i in range(6)] == pytest.approx(
        [0.025, 0.05, 0.075, 0.1, 0.1, 0.1]
    )
    cosine = Settings(lr=0.2, schedule="cosine")
    # Values of (1 + cos x) / 2 at 0, 60, 90, 120 degrees.
    assert [cosine.rate(i, 6) for i in (0, 2, 3, 4)] == pytest.approx([0.2, 0.15, 0.1, 0.05])
    both = Settings(lr=0.2, schedule="cosine", warmup=2)
    assert [both.rate(i, 8) for i in (0, 1, 2, 4, 5, 6)] == pytest.approx(
        [0.1, 0.2, 0.2, 0.15, 0.1, 0.05]
    )
    assert all(r > 0 for r in (both.rate(i, 8) for i in range(8)))


def test_rates_are_those_of_transformers():
    import torch
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 0, 12)
    ours = Settings(lr=0.3, schedule="cosine")
    for step in range(12):
        assert ours.rate(step, 12) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    "settings, pictures, steps",
    [
        ({"steps": 7}, 100, 7),
        ({"epochs": 10, "batch": 4}, 16, 40),
        ({"epochs": 10, "batch": 4, "accumulate": 2}, 16, 20),
        ({"epochs": 3, "batch": 8}, 20, 8),  # 7.5 by halves to even
        ({"epochs": 1, "batch": 8}, 1, 1),
        ({"epochs": 0.5, "batch": 2}, 16, 4),
    ],
)
def test_epochs_to_steps(settings, pictures, steps):
    assert Settings(**settings).total_steps(pictures) == steps


def test_targets():
    assert Settings(targets=" to_q, to_k ,").target_modules() == ["to_q", "to_k"]
    attention = Settings(targets="attention").target_modules()
    assert attention == ["to_q", "to_k", "to_v", "to_out.0"]
    assert set(attention) < set(Settings(targets="attention+ff").target_modules())
    assert "conv1" in Settings(targets="all").target_modules()


def test_plain_is_registered():
    assert "plain" in METHODS and METHODS["plain"].summary
