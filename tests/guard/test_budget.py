"""Budgets against brute force."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffward.errors import InputError
from diffward.guard.budget import choose, share_of


@given(st.lists(st.integers(-50, 50), min_size=3, max_size=9, unique=True), st.floats(0.15, 0.85))
def test_equal_costs_give_the_best_set_there_is(scores: list[int], share: float) -> None:
    k = round(share * len(scores))
    if not 0 < k < len(scores):
        return
    frozen = choose(torch.tensor(scores), [1.0] * len(scores), share)
    best = max(sum(scores[i] for i in some) for some in combinations(range(len(scores)), k))
    assert int(frozen.sum()) == k
    assert sum(s for s, f in zip(scores, frozen.tolist(), strict=True) if f) == best


@given(
    st.lists(st.tuples(st.integers(-50, 50), st.integers(1, 30)), min_size=3, max_size=9),
    st.floats(0.1, 0.9),
)
def test_unequal_costs_keep_to_the_budget_and_to_the_ranking(
    tensors: list[tuple[int, int]], share: float
) -> None:
    scores, costs = torch.tensor([t[0] for t in tensors]), [t[1] for t in tensors]
    room = share * sum(costs)
    order = sorted(range(len(costs)), key=lambda i: -scores[i].item())
    # Of all sets that fit, the one whose ranking comes first: by hand.
    fitting = [
        some
        for n in range(len(costs) + 1)
        for some in combinations(range(len(costs)), n)
        if sum(costs[i] for i in some) <= (room if len(set(costs)) > 1 else round(share * len(costs)) * costs[0]) + 1e-9
    ]  # fmt: skip
    first = max(fitting, key=lambda some: tuple(i in some for i in order))
    if not 0 < len(first) < len(costs):
        with pytest.raises(InputError, match="would freeze"):
            choose(scores, costs, share)
        return
    frozen = choose(scores, costs, share)
    assert set(first) == set(torch.nonzero(frozen).flatten().tolist())
    assert share_of(frozen, costs) == pytest.approx(sum(costs[i] for i in first) / sum(costs))


def test_ties_go_to_the_earlier_tensor() -> None:
    assert choose(torch.zeros(4), [1.0] * 4, 0.5).tolist() == [True, True, False, False]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, 30, float("nan")])
def test_a_share_that_is_none(share: float) -> None:
    with pytest.raises(InputError, match="--budget"):
        choose(torch.rand(5), [1.0] * 5, share)


def test_a_share_too_small_for_any_tensor() -> None:
    with pytest.raises(InputError, match="no tensor of 3"):
        choose(torch.rand(3), [10.0, 20.0, 30.0], 0.1)


def test_scores_that_are_not_finite() -> None:
    with pytest.raises(InputError, match="1 tensors are not finite"):
        choose(torch.tensor([1.0, float("nan"), 2.0]), [1.0] * 3, 0.4)
