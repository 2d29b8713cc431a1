"""Dataset size from singular values: nearest neighbours by module, and the vote."""

from __future__ import annotations

import pytest
import torch

from diffward.errors import InputError
from diffward.inversion.spectrum import Constant, Spectral, log_spectra
from diffward.inversion.tokens import Tokens


def tokens(count, modules=6, seed=0):
    """LoRAs whose second singular value tells their size."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([1.0, 2.0, 4.0, 8.0]).repeat(count // 4)
    spectra = torch.zeros(count, modules, 8)
    spectra[..., 1] = 0.1 * sizes[:, None].log2() + 0.02 * torch.rand(count, modules, generator=g)
    spectra[..., 0] = (1 - spectra[..., 1].square()).sqrt()
    norms = 0.01 * torch.randn(count, modules, generator=g)
    there = torch.ones(count, modules, dtype=torch.bool)
    return Tokens(torch.zeros(count, modules, 2, 2), norms, spectra, there), sizes


@pytest.mark.parametrize("vote", ["mode", "median"])
def test_reads_the_size_where_one_recipe_shows_it(vote):
    known, sizes = tokens(40)
    asked, truth = tokens(20, seed=1)
    assert (Spectral.fit(known, sizes).predict(asked, vote) == truth).all()
    constant = Constant.fit(sizes)
    assert (constant.predict(asked) == 3).all()


def test_a_module_votes_by_its_nearest_neighbour():
    known, sizes = tokens(12)
    asked, _ = tokens(8, seed=1)
    votes = Spectral.fit(known, sizes).votes(asked)
    for row in range(8):
        for module in range(6):
            away = (log_spectra(known)[:, module] - log_spectra(asked)[row, module]).square().sum(1)
            assert votes[row, module] == sizes[away.argmin()]


def test_modules_that_are_not_there_have_no_vote():
    known, sizes = tokens(12)
    asked, truth = tokens(4, seed=1)
    asked.present[:, 1:] = False
    known.present[:, 2] = False
    spectral = Spectral.fit(known, sizes)
    votes = spectral.votes(asked)
    assert votes[:, 0].isfinite().all() and votes[:, 1:].isnan().all()
    assert (spectral.predict(asked) == truth).all()
    asked.present[:] = False
    with pytest.raises(InputError, match="no module"):
        spectral.predict(asked)


def test_a_tie_goes_to_the_size_nearest_the_median():
    from diffward.inversion.spectrum import _modes

    votes = torch.tensor([[1.0, 1, 8, 8, 7], [2, 2, 3, torch.nan, torch.nan]])
    assert _modes(votes, votes.nanmedian(1).values).tolist() == [8, 2]


def test_says_what_does_not_fit():
    known, sizes = tokens(12)
    spectral = Spectral.fit(known, sizes)
    with pytest.raises(InputError, match="modules"):
        spectral.predict(tokens(4, modules=5)[0])
    with pytest.raises(InputError, match="choose mode or median"):
        spectral.predict(known, "mean")
    with pytest.raises(InputError, match="at least one"):
        Spectral.fit(known, sizes[:5])
    with pytest.raises(InputError, match="at least 1"):
        Spectral.fit(known, sizes - 1)
    with pytest.raises(InputError, match="no LoRA"):
        Constant.fit([])
