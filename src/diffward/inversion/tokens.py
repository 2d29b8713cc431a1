"""What a network sees of a LoRA: a fixed number of numbers a module, the same however the LoRA was factored.

Of each module's change W (in canonical form u, sigma, v), by its Frobenius norm: the core P^T W Q in two fixed bases,
the log of the norm, and the leading singular values. The core is bilinear in u and v, so the signs that the
canonical form leaves open, and rotations among equal singular values, do not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from diffward.errors import InputError
from diffward.lora.canonical import Canonical, canonical_factors, canonical_module

if TYPE_CHECKING:
    from diffward.inversion.zoo import Row, Zoo
    from diffward.lora import LoraWeights

SPECTRUM = 8  # leading singular values, as shares of the norm
SIDE = 24  # vectors of each basis
_TINY = 1e-12


@dataclass(frozen=True)
class Tokens:
    """Of n LoRAs: cores (n, M, p, q), log norms (n, M), spectra (n, M, 8) and which modules are there (n, M).

    A module that a LoRA does not have, or that it does not change, has zeros.
    """

    cores: Tensor
    norms: Tensor
    spectra: Tensor
    present: Tensor

    def __len__(self) -> int:
        return len(self.cores)

    def of(self, rows: Tensor | Sequence[int]) -> Tokens:
        index = torch.as_tensor(rows)
        return Tokens(
            self.cores[index], self.norms[index], self.spectra[index], self.present[index]
        )

    @classmethod
    def cat(cls, parts: Sequence[Tokens]) -> Tokens:
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])))

    def shuffled(self, seed: int = 0) -> Tokens:
        """The entries of each core in a random order of its own: norms and spectra stay, directions are lost."""
        g = torch.Generator().manual_seed(seed)
        cores = self.cores.flatten(2)
        order = torch.rand(cores.shape, generator=g).argsort(-1)
        mixed = cores.gather(-1, order).view_as(self.cores)
        return Tokens(mixed, self.norms, self.spectra, self.present)

    def half(self) -> Tokens:
        """In half precision, for keeping many."""
        return Tokens(self.cores.half(), self.norms, self.spectra, self.present)


@dataclass(frozen=True)
class Basis:
    """Two orthonormal bases a module: left (out, p) and right (in, q), of matrices flattened to (out, in kh kw)."""

    left: dict[str, Tensor]
    right: dict[str, Tensor]

    @property
    def modules(self) -> list[str]:
        return list(self.left)

    @classmethod
    def fit(cls, zoo: Zoo, rows: Sequence[Row], side: int = SIDE) -> Basis:
        """The directions in which the changes of these rows lie most, each row counting alike.

        Raises:
            InputError: there are no rows.
        """
        if not rows:
            raise InputError(f"{zoo.folder}: no saves to learn bases from")
        left: dict[str, Tensor] = {}
        right: dict[str, Tensor] = {}
        for _, tensors in zoo.shards(rows):
            for name in zoo.head.modules:
                one = _module(tensors, name)
                share = one.sigma / one.sigma.norm(dim=-1, keepdim=True).clamp_min(_TINY)
                for sums, vectors in ((left, one.u), (right, one.v)):
                    scaled = vectors * share[:, None]
                    scaled = scaled.transpose(0, 1).flatten(1)
                    sums[name] = sums.get(name, 0) + scaled @ scaled.T
        return cls(
            {n: _leading(s, side) for n, s in left.items()},
            {n: _leading(s, side) for n, s in right.items()},
        )

    def of_zoo(self, zoo: Zoo, rows: Sequence[Row]) -> Tokens:
        """Tokens of some saves of a zoo, in half precision, in the order of `rows`.

        Raises:
            InputError: there are no rows.
        """
        if not rows:
            raise InputError(f"{zoo.folder}: no saves to look at")
        parts, order = [], []
        for numbers, tensors in zoo.shards(rows):
            parts.append(
                self.project({name: _module(tensors, name) for name in self.modules}).half()
            )
            order += numbers
        return Tokens.cat(parts).of(torch.tensor(order).argsort())

    def of_lora(
        self, weights: LoraWeights, base_weights: Mapping[str, Tensor] | None = None
    ) -> Tokens:
        """Tokens (1, ...) of a LoRA of any kind, resolved against the base.

        Args:
            base_weights: by module, where the file has DoRA.

        Raises:
            InputError: it adapts none of the modules that are known here.
        """
        found: dict[str, Canonical] = {}
        for name in self.modules:
            if (module := weights.modules.get(name)) is None:
                continue
            one = canonical_module(module, (base_weights or {}).get(name))
            if (
                one.u.shape[0] != self.left[name].shape[0]
                or one.v.shape[0] != self.right[name].shape[0]
            ):
                raise InputError(
                    f"module {name}: its shape is not that of the base this was made for"
                )
            found[name] = Canonical(one.u[None], one.sigma[None], one.v[None])
        if not found:
            raise InputError("the LoRA adapts none of the modules that the inverter knows")
        return self.project(found)

    def project(self, modules: Mapping[str, Canonical]) -> Tokens:
        """Of batched canonical forms (n, ...), by module; modules that are missing count as not there."""
        first = next(iter(modules.values()))
        count = len(first.sigma)
        # A module with fewer directions than others has zeros in place of the rest.
        p, q = (max(b.shape[1] for b in side.values()) for side in (self.left, self.right))
        cores, norms, spectra, present = [], [], [], []
        for name in self.modules:
            if name not in modules:
                cores.append(first.sigma.new_zeros(count, p, q))
                norms.append(first.sigma.new_zeros(count))
                spectra.append(first.sigma.new_zeros(count, SPECTRUM))
                present.append(torch.zeros(count, dtype=torch.bool, device=first.sigma.device))
                continue
            one = modules[name]
            norm = one.sigma.norm(dim=-1)
            there = norm > _TINY
            share = one.sigma / norm.clamp_min(_TINY)[:, None]
            core = (self.left[name].T @ one.u * share[:, None]) @ (one.v.mT @ self.right[name])
            more = 0, q - core.shape[2], 0, p - core.shape[1]
            cores.append(F.pad(core * there[:, None, None], more))
            norms.append(norm.clamp_min(_TINY).log() * there)
            spectra.append(Canonical(one.u, share, one.v).top(SPECTRUM).sigma)
            present.append(there)
        return Tokens(
            torch.stack(cores, 1),
            torch.stack(norms, 1),
            torch.stack(spectra, 1),
            torch.stack(present, 1),
        )


def _module(tensors: Mapping[str, Tensor], name: str) -> Canonical:
    down, up = tensors[f"{name}.down"], tensors[f"{name}.up"]
    return canonical_factors(down.flatten(2), up.flatten(2), tensors[f"{name}.scale"])


def _leading(second_moment: Tensor, side: int) -> Tensor:
    _, vectors = torch.linalg.eigh(second_moment.double())
    return vectors[:, -side:].flip(1).float().contiguous()
