"""Effective weights and the user's step, against autograd and against the paper's equations."""

from __future__ import annotations

import copy
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffward.guard.budget import choose
from diffward.guard.effective import Effective
from diffward.guard.freeze import Budgeted
from diffward.guard.published import SPARSITY, STEP, Published
from diffward.guard.settings import GuardSettings
from diffward.guard.user import SGD, AdamW, Factored, make_optimizer


class Net(nn.Module):
    """A few tensors of different shapes, and a loss that couples them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 3, bias=False)
        self.c = nn.Conv2d(2, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        image = self.c(x.view(-1, 1, 1, 5).expand(-1, 2, 3, 5)).mean((1, 2))
        return self.b(torch.tanh(self.a(x))) + image


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in net.named_parameters()}


@pytest.fixture
def made() -> tuple[Net, dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    net = Net()
    base = weights(net)
    tuned = {n: t + 0.1 * torch.randn_like(t) for n, t in base.items()}
    return net, base, tuned, torch.rand(len(base)).double(), torch.randn(6, 5)


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) ** 2).mean()


def test_weights_lie_between(made: Any) -> None:
    net, base, tuned, m, _ = made
    Effective(net, base, tuned, m, SGD(), 0.1)
    for share, (name, p) in zip(m, net.named_parameters(), strict=True):
        assert torch.allclose(
            p, tuned[name] + share.float() * (base[name] - tuned[name]), atol=1e-6
        )


def test_at_the_ends_they_are_bit_for_bit_one_or_the_other(made: Any) -> None:
    net, base, tuned, m, _ = made
    effective = Effective(net, base, tuned, torch.ones_like(m), SGD(), 0.1)
    assert all(torch.equal(p, base[n]) for n, p in net.named_parameters())
    effective.set_mask(torch.zeros_like(m))
    assert all(torch.equal(p, tuned[n]) for n, p in net.named_parameters())


def test_readings_are_the_gradient_of_the_mask(made: Any) -> None:
    net, base, tuned, m, x = made
    free = m.float().clone().requires_grad_(True)
    mixed = {n: tuned[n] + free[i] * (base[n] - tuned[n]) for i, n in enumerate(base)}
    loss = (torch.func.functional_call(net, mixed, (x,)) ** 2).mean()
    (truth,) = torch.autograd.grad(loss, free)
    effective = Effective(net, base, tuned, m, SGD(), 0.1)
    with effective:
        found = effective.backward(loss_of(net, x), move=False)
    assert torch.allclose(found.float(), truth, rtol=1e-4, atol=1e-7)
    assert all(torch.equal(effective.tuned[n], tuned[n]) for n in tuned)


def test_the_users_step_is_the_papers(made: Any) -> None:
    """eqs. 9, 10, 12: D = -lr (1 - m) g; theta += (1 - m) D; theta_pre - theta_ft -= D."""
    net, base, tuned, m, x = made
    lr = 0.05
    effective = Effective(net, base, tuned, m, SGD(), lr)
    before = weights(net)

    copied = copy.deepcopy(net)
    for p in copied.parameters():
        p.requires_grad_(True)
    loss_of(copied, x).backward()
    truth = {n: p.grad for n, p in copied.named_parameters()}
    with effective:
        effective.backward(loss_of(net, x))
    for share, (name, p) in zip(m.float(), net.named_parameters(), strict=True):
        step = -lr * (1 - share) * truth[name]
        assert torch.allclose(effective.tuned[name], tuned[name] + step, atol=1e-6)
        assert torch.allclose(p, before[name] + (1 - share) * step, atol=1e-6)


def test_no_gradient_of_a_matrix_is_kept(made: Any) -> None:
    net, base, tuned, m, x = made
    effective = Effective(net, base, tuned, m, SGD(), 0.1)
    matrices = [p for p in net.parameters() if p.ndim > 1]
    held: list[int] = []
    with effective:
        for p in matrices:
            # Runs after the effective weights' own hook: by then each gradient must be gone.
            p.register_post_accumulate_grad_hook(
                lambda _: held.append(sum(q.grad is not None for q in matrices))
            )
        effective.backward(loss_of(net, x))
    assert len(held) == len(matrices) and max(held) == 0
    assert all(p.grad is None for p in net.parameters())


def step_of(optimizer: Any, name: str, gradient: Tensor) -> Tensor:
    """What the optimizer adds at rate 1; the gradient stays as it is."""
    step = torch.zeros_like(gradient)
    optimizer.move(name, step, gradient.clone(), 1.0)
    return step


@pytest.mark.parametrize("name", ["adamw", "factored", "sgd"])
def test_vectors_move_together_as_each_would_alone(name: str) -> None:
    torch.manual_seed(5)
    sizes, alone, together = [3, 1, 7], make_optimizer(name), make_optimizer(name)
    for _ in range(4):
        gradients = [torch.randn(n) * 10.0**-i for i, n in enumerate(sizes)]
        rates = [0.5, 2.0, 0.1]
        truth = [
            r * step_of(alone, str(i), g)
            for i, (r, g) in enumerate(zip(rates, gradients, strict=True))
        ]
        found, rate = torch.zeros(11), torch.tensor(rates).repeat_interleave(torch.tensor(sizes))
        together.move("all", found, torch.cat(gradients), rate, sizes)
        assert torch.allclose(found, torch.cat(truth), atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "factored", "sgd"])
@pytest.mark.parametrize("shape", [(6,), (5, 4), (3, 2, 2, 2)])
def test_a_rate_for_every_entry_is_a_rate_where_all_are_alike(
    name: str, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(6)
    one, many = make_optimizer(name), make_optimizer(name)
    here, there = torch.ones(shape), torch.ones(shape)
    for _ in range(3):
        gradient = torch.randn(shape)
        one.move("w", here, gradient.clone(), 0.3)
        many.move("w", there, gradient.clone(), torch.full(shape, 0.3))
    assert torch.allclose(here, there, atol=1e-6) and not torch.equal(here, torch.ones(shape))


def test_factored_moments_follow_their_definition() -> None:
    """Shazeer & Stern 2018, algorithm 4 without momentum, in double precision and entry by entry."""
    torch.manual_seed(7)
    optimizer, beta = Factored(), 0.999
    row, column = torch.zeros(4, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for n in range(1, 5):
        gradient = torch.randn(4, 6) * torch.rand(4, 6) ** 3
        g = gradient.double()
        row = beta * row + (1 - beta) * (g**2).mean(1)
        column = beta * column + (1 - beta) * (g**2).mean(0)
        second = torch.outer(row, column) / row.mean() / (1 - beta**n)
        step = g / second.sqrt()
        step = step / max(1.0, float((step**2).mean().sqrt()))
        assert torch.allclose(step_of(optimizer, "w", gradient).double(), -step, rtol=1e-4)


def test_adamw_is_torchs(made: Any) -> None:
    net, *_, x = made
    ours, theirs = copy.deepcopy(net), copy.deepcopy(net)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0)
    own = AdamW()
    for _ in range(4):
        for one in (ours, theirs):
            one.zero_grad()
            loss_of(one, x).backward()
        with torch.no_grad():
            for name, p in ours.named_parameters():
                assert p.grad is not None
                own.move(name, p, p.grad, 1e-2)
        optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-6)


def test_factored_moments_are_exact_where_the_square_is_of_rank_one() -> None:
    row, column = torch.rand(6) + 0.5, torch.rand(4) + 0.5
    gradient = torch.outer(row, column) * torch.randint(0, 2, (6, 4)).mul(2).sub(1)
    assert torch.allclose(step_of(Factored(), "w", gradient), -gradient.sign(), atol=1e-4)


@pytest.mark.parametrize("size", [1e-3, 1e-7, 1e-8])
def test_small_gradients_are_held_back_as_adams_are(size: float) -> None:
    signs = torch.randint(0, 2, (6, 4), generator=torch.Generator().manual_seed(3)) * 2.0 - 1
    ours, adams = (step_of(one, "w", size * signs) for one in (Factored(), AdamW()))
    assert torch.equal(ours.sign(), adams.sign())
    assert torch.allclose(ours, adams, atol=0.25)


def test_factored_steps_are_as_long_as_adams_and_no_longer() -> None:
    torch.manual_seed(1)
    for shape in ((9, 5), (7,), (4, 3, 3, 3)):
        optimizer = Factored()
        for _ in range(5):
            step = step_of(optimizer, "w", torch.randn(shape) * torch.rand(shape) ** 4 * 1e-3)
        assert step.shape == shape
        assert 0.4 < float(step.square().mean().sqrt()) <= 1 + 1e-5


@pytest.mark.parametrize("name", ["adamw", "factored", "sgd"])
def test_an_optimizer_goes_on_where_it_was(name: str) -> None:
    torch.manual_seed(2)
    gradients = [torch.randn(3, 4) for _ in range(6)]
    whole, first, second = (make_optimizer(name) for _ in range(3))
    for g in gradients[:3]:
        step_of(whole, "w", g)
        step_of(first, "w", g)
    second.load(copy.deepcopy(first.state()))
    for g in gradients[3:]:
        assert torch.equal(step_of(whole, "w", g), step_of(second, "w", g))


def learned(net: Net, base: Any, tuned: Any, losses: Any, share: float) -> Tensor:
    """The hard mask (N,) that the bilevel update finds with a user who stands still."""
    settings = GuardSettings(budget=share, by="tensors", updates=120, mask_lr=0.05)
    upper = Budgeted(settings, torch.ones(len(base), dtype=torch.float64), (1.0, 1.0))
    effective = Effective(net, base, tuned, upper.mask(), SGD(), 1e-12)
    with effective:
        for _ in range(settings.updates):
            ill, inn = (effective.backward(loss(net), move=False) for loss in losses)
            upper.update(ill, inn)
            effective.set_mask(upper.mask())
            assert float(upper.at(share).mean()) == pytest.approx(share, abs=1e-9)
    return choose(upper.scores(), [1.0] * len(base), share)


def test_the_mask_is_the_best_of_all_masks() -> None:
    """Against brute force: of all hard masks of two tensors, the one that hurts the illegal domain alone most."""
    for seed in range(3):
        torch.manual_seed(seed)
        net = Net()
        base = weights(net)
        tuned = {n: t + 0.3 * torch.randn_like(t) for n, t in base.items()}
        # Three tensors matter to the illegal domain, the others to the innocent one, each by its own amount.
        order = torch.randperm(len(base)).tolist()
        matters = [dict.fromkeys(base, 0.0) for _ in range(2)]
        for place, name in zip(order, base, strict=True):
            matters[int(place > 2)][name] = float(torch.rand(()) + 0.1)

        def loss(domain: int, net: nn.Module, by: Any = matters, to: Any = tuned) -> Tensor:
            terms = [by[domain][n] * (p - to[n]).square().mean() for n, p in net.named_parameters()]
            return torch.stack(terms).sum()

        losses = [lambda net, i=i, loss=loss: loss(i, net) for i in range(2)]
        frozen = learned(net, base, tuned, losses, 2 / len(base))
        gaps = {}
        for some in combinations(range(len(base)), 2):
            with torch.no_grad():
                for i, (n, p) in enumerate(net.named_parameters()):
                    p.copy_(base[n] if i in some else tuned[n])
                gaps[some] = float(losses[0](net) - losses[1](net))
        assert tuple(torch.nonzero(frozen).flatten().tolist()) == max(gaps, key=gaps.__getitem__), (
            seed
        )


def test_the_published_update_is_its_equation() -> None:
    settings = GuardSettings(budget=0.2, paper=True, seed=3)
    upper = Published(settings, 20)
    x = upper.x.clone()
    ill, inn = torch.randn(20).double(), torch.randn(20).double()
    upper.update(ill, inn)
    free = x.clone().requires_grad_(True)
    m = torch.sigmoid(free / 0.2)
    (STEP * ((inn - ill) / 2 * m).sum() + SPARSITY * (m.mean() - 0.2) ** 2).backward()
    assert free.grad is not None
    assert torch.allclose(upper.x, x - free.grad)


def test_the_published_update_ignores_the_pictures() -> None:
    """Its mask is the top of its own random start, whatever is read (research page, section 0)."""
    settings = GuardSettings(budget=0.2, paper=True, seed=1)
    start = Published(settings, 686).x
    upper = Published(settings, 686)
    torch.manual_seed(0)
    for _ in range(50):
        # Readings as large as any that were measured (2e-4 on average, 0.03 at most).
        upper.update(*(torch.randn(686).double() * 2e-4 for _ in range(2)))
    k = int((upper.mask() > 0.5).sum())
    assert 0 < k < 686
    assert set(upper.x.topk(k).indices.tolist()) == set(start.topk(k).indices.tolist())
