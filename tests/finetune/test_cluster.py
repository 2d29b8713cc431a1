"""Tasks on a real Ray cluster of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from diffward.errors import InputError
from diffward.finetune.cluster import on_ray

ray = pytest.importorskip("ray", reason="Ray is not installed (pip install diffward[cluster])")
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def cluster() -> Iterator[None]:
    yield
    ray.shutdown()


def test_answers_come_from_other_processes_and_usage_is_not_reported() -> None:
    def work(offset: int, part: int) -> tuple[int, int]:
        return offset + part, os.getpid()

    answers = list(on_ray(work, [100], [1, 2, 3], gpu=False))
    assert sorted(value for value, _ in answers) == [101, 102, 103]
    assert os.getpid() not in {pid for _, pid in answers}
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_a_task_that_fails_says_so_in_our_one_line() -> None:
    def work(part: int) -> int:
        if part == 2:
            raise InputError("part 2: is no part; leave it out")
        return part

    with pytest.raises(InputError, match=r"^part 2: is no part; leave it out$"):
        list(on_ray(work, [], [1, 2, 3], gpu=False))
