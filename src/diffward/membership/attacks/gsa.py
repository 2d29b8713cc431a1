"""GSA: how steep the loss is along the LoRA's weights, learned from labelled pictures.

After Pang et al. 2025: squared gradient norms by layer at several timesteps, and a classifier on
them. Three differences:

- Gradients are along the LoRA's factors: the weights which training moved. Of a full model they are along the
  best 16 of the change of each matrix (`factors.change_factors`).
- The paper trains XGBoost on shadow models, with a feature a layer. Here a logistic regression is
  cross-fitted on the audited model's own labelled pictures, on 12 features; a few hundred pictures
  do not bear more. CopyMark (arXiv 2410.03640) found such classifiers perfect on their training
  set and at chance beyond it.
- Norms enter as logarithms, since they spread over orders of magnitude.

GSA2 averages squared norms, and not gradients, over timesteps: the gradient of the mean is the mean
of the gradients, so that it would be GSA1 again.
"""

from __future__ import annotations

import numpy as np

from diffward.membership.attack import ATTACKS
from diffward.membership.bank import ON, Bank

STRETCHES = 6
MEAN_LOSS, EACH_STEP = 0, 1  # kinds of the probe
_TINY = 1e-30  # a factor that is zero has no gradient along the other
_PAPER = "Pang et al. 2025, PoPETs (arXiv 2308.06405)"


@ATTACKS.register(
    "gsa1", paper=_PAPER, access="white box, with known members", cost="8 forward and backward passes",
    asks=(("gradients", ON),), needs=("labels",), suite="standard",
)  # fmt: skip
def gsa1(bank: Bank) -> np.ndarray:
    """Members' loss is flatter: a classifier on log ||grad mean_t l||², the loss averaged over timesteps first."""
    return _learned(bank, MEAN_LOSS)


@ATTACKS.register(
    "gsa2", paper=_PAPER, access="white box, with known members", cost="8 forward and backward passes, those of gsa1",
    asks=(("gradients", ON),), needs=("labels",), suite="standard",
)  # fmt: skip
def gsa2(bank: Bank) -> np.ndarray:
    """As gsa1, on log mean_t ||grad l_t||²: norms at each timestep, then averaged."""
    return _learned(bank, EACH_STEP)


def _learned(bank: Bank, kind: int) -> np.ndarray:
    norms = bank.of("gradients", ON)[..., kind]
    if not norms.shape[1]:
        return np.zeros(len(norms))  # the LoRA is on the text encoder alone
    return bank.crossfit(gradient_features(norms))


def gradient_features(norms: np.ndarray) -> np.ndarray:
    """Features (N, 12) of squared norms (N, M modules, 2 factors).

    Modules come in the order of the forward pass. They are cut into 6 stretches of equal length
    (fewer than 6 modules: as many), and a feature is the mean log norm of a stretch, for A and B.
    """
    logs = np.log(np.maximum(norms, _TINY))
    stretches = np.array_split(logs, min(STRETCHES, logs.shape[1]), axis=1)
    return np.concatenate([stretch.mean(axis=1) for stretch in stretches], axis=1)
