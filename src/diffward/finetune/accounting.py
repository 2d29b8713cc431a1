"""How much privacy so many noisy steps cost, and how much noise a target takes; opacus counts."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from diffward.errors import InputError
from diffward.finetune.settings import DP

# More noise than this makes no sense: in every coordinate it is ten times the largest sum of gradients.
MOST_NOISE = 10.0
# The numerical accountant (PRV) is made for smaller epsilons; beyond, Renyi's bound is as good as any.
LOOSE = 1000.0


@dataclass(frozen=True)
class Ledger:
    """The privacy cost of steps of DP-SGD: Poisson draws, Gaussian noise, a record added or removed.

    Attributes:
        noise: noise multiplier, the noise's standard deviation over the clipping norm.
        rate: chance of a picture to be drawn in a step.
        delta: chance that the bound fails.
        accountant: "prv" (Gopi et al. 2021) or "rdp" (Mironov 2017), as opacus has them.
        error: largest error of prv's numerical epsilon, on the safe side.
    """

    noise: float
    rate: float
    delta: float
    accountant: str
    error: float = 0.01

    def epsilon(self, steps: int) -> float:
        """What `steps` steps cost. prv takes up to some seconds for a question it was not asked before."""
        return _epsilon(self, steps)

    def bound(self, steps: int) -> float:
        """A wider bound, by rdp, in no time: Renyi divergences of steps add up."""
        from opacus.accountants import RDPAccountant
        from opacus.accountants.analysis.rdp import get_privacy_spent

        if steps == 0:
            return 0.0
        with _quiet():
            divergences = _divergences(self.noise, self.rate) * steps
            spent, _ = get_privacy_spent(
                orders=RDPAccountant.DEFAULT_ALPHAS, rdp=divergences, delta=self.delta
            )
        return max(0.0, float(spent))


@lru_cache(maxsize=64)
def _divergences(noise: float, rate: float) -> np.ndarray:
    """Renyi divergence of one step at each of the orders that opacus tries."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import compute_rdp

    orders = RDPAccountant.DEFAULT_ALPHAS
    return compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=orders)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """opacus warns where its best order is the first or the last that it tries."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


@lru_cache(maxsize=256)
def _epsilon(ledger: Ledger, steps: int) -> float:
    from opacus.accountants import create_accountant

    if steps == 0:
        return 0.0
    accountant = create_accountant(ledger.accountant)
    accountant.history = [(ledger.noise, ledger.rate, steps)]
    with _quiet():
        try:
            return max(0.0, float(accountant.get_epsilon(ledger.delta, eps_error=ledger.error)))
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"the accountant {ledger.accountant} fails at noise {ledger.noise:g}, delta "
                f"{ledger.delta:g} ({error}); take --dp.accountant rdp"
            ) from error


def plan(options: DP, per_step: int, pictures: int, steps: int) -> Ledger:
    """The noise for `options`, when `steps` steps draw `per_step` of `pictures` pictures on average.

    Raises:
        InputError: no target or two, a draw larger than the data, or an epsilon that cannot be had.
    """
    if bool(options.epsilon) == bool(options.noise):
        which = "only one of" if options.noise else "one of"
        raise InputError(f"method dp needs {which} --dp.epsilon and --dp.noise")
    rate = per_step / pictures
    if rate > 1:
        raise InputError(
            f"--batch times --accumulate draws {per_step} pictures a step, but there are {pictures}"
        )
    # The file tells delta, so it tells the number of pictures no closer than to a power of ten.
    delta = options.delta or 10.0 ** -math.ceil(math.log10(10 * pictures))
    if delta * pictures >= 1:
        raise InputError(
            f"--dp.delta {delta:g}: must be well below 1 / {pictures}, one over the pictures"
        )
    if options.noise:
        loose = Ledger(options.noise, rate, delta, "rdp").bound(steps)
        kind = "rdp" if loose > LOOSE else options.accountant
        return Ledger(options.noise, rate, delta, kind, _error(loose))
    kind = "rdp" if options.epsilon > LOOSE else options.accountant
    most = Ledger(MOST_NOISE * per_step, rate, delta, kind, _error(options.epsilon))
    _check_reachable(most, options.epsilon, steps, f"{per_step} of {pictures} pictures a step")
    return Ledger(_noise(most, options.epsilon, steps), rate, delta, kind, most.error)


@lru_cache(maxsize=64)
def _noise(most: Ledger, epsilon: float, steps: int) -> float:
    from opacus.accountants.utils import get_noise_multiplier

    with _quiet():
        return get_noise_multiplier(
            target_epsilon=epsilon,
            target_delta=most.delta,
            sample_rate=most.rate,
            steps=steps,
            accountant=most.accountant,
            epsilon_tolerance=min(0.01, epsilon / 100),
            eps_error=most.error,
        )


def _check_reachable(most: Ledger, epsilon: float, steps: int, draw: str) -> None:
    least = most.epsilon(steps)
    if least <= epsilon:
        return
    enough, too_many = 0, steps
    while too_many - enough > 1:
        middle = (enough + too_many) // 2
        reached = most.bound(middle) + 2 * most.error <= epsilon
        enough, too_many = (middle, too_many) if reached else (enough, middle)
    fewer = f"--steps {enough} would reach it; else " if enough else ""
    raise InputError(
        f"--dp.epsilon {epsilon:g}: {steps} steps with {draw} reach {least:.2g} at best, at noise "
        f"{most.noise:g}; {fewer}take a smaller --batch or more pictures"
    )


def _error(epsilon: float) -> float:
    """opacus's own 0.01 where it suits; a tenth of small epsilons, a thousandth of large ones."""
    return min(0.01, epsilon / 10) if epsilon < 10 else min(epsilon, LOOSE) / 1000


def rounded_up(epsilon: float) -> str:
    """Three digits, and never less than it is."""
    if not 0 < epsilon < math.inf:
        return f"{epsilon:g}"
    unit = 10.0 ** (math.floor(math.log10(epsilon)) - 2)
    return f"{math.ceil(epsilon / unit - 1e-9) * unit:.3g}"
