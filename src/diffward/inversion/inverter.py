"""The inverter: one file that reads LoRAs of one base, and knows how well it does."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffward.errors import InputError
from diffward.files import atomic_path
from diffward.inversion.decoders import LatentDecoder, SoftPrompt
from diffward.inversion.encoder import Encoder, EncoderConfig, Heads
from diffward.inversion.floor import Floor
from diffward.inversion.identity import IdentitySpace
from diffward.inversion.sets import SetHead
from diffward.inversion.tokens import Basis, Tokens

if TYPE_CHECKING:
    from diffward.lora import LoraWeights
    from diffward.models.denoiser import Denoiser
    from diffward.models.eyes import Eye

TEXT_RANK = 8  # directions kept of what a held-out LoRA learned along
SCHEMA = "diffward.inverter/1"
SHIPPED = Path(__file__).parent / "shipped"


@dataclass(frozen=True)
class Facts:
    """What a file says of itself.

    Attributes:
        modules: names and (out, in) of the matrices.
        side: vectors of each basis.
        identity: dimensions of identity vectors, of an eye's `features`; `eye_print` tells that eye from others.
        drawn: sizes of the conditioning and of the latents, for the decoders.
        sizes: subjects in the gallery, and held-out LoRAs kept for comparison.
        zoo: what it learned from.
        held_out: how well it reads LoRAs of subjects that it never saw.
        picture_set: vectors in the set that stands for single pictures; 0: it reads none.
    """

    base: str
    base_identity: str
    modules: dict[str, list[int]]
    side: int
    eye: str
    eye_print: list[float]
    features: int
    identity: int
    attributes: dict[str, list[str]]
    encoder: dict[str, Any]
    drawn: dict[str, list[int]]
    sizes: dict[str, int]
    zoo: dict[str, Any]
    held_out: dict[str, Any]
    picture_set: int = 0


@dataclass(frozen=True)
class Reading:
    """What weights say of n LoRAs.

    identity (n, k), in units of the subjects' spread about their mean; picture_set (n, S, k): vectors of single training
    pictures, in the same units; attributes: shares (n, values); log_pictures, log_steps (n,); subject (n,): log odds that
    there is one; mu and logvar (n, latent) of z; floor (n, targets).
    """

    identity: Tensor
    picture_set: Tensor
    attributes: dict[str, Tensor]
    log_pictures: Tensor
    log_steps: Tensor
    subject: Tensor
    mu: Tensor
    logvar: Tensor
    floor: Tensor


class Inverter(nn.Module):
    """Bases, floor, encoder, heads, decoders, and a gallery of strangers.

    Attributes:
        gallery, others: identity vectors of strangers, and what the floor reads of LoRAs of subjects that it never
            saw: the two null distributions of an audit.
        others_z: z of some of these LoRAs: what pictures from another's weights look like.
        empty: the floor's score of there being a subject, of LoRAs that hold none.
        moment, text_others: along which text states LoRAs learn, in the mean (D, D) and some held-out ones, factored.
    """

    floor_mean: Tensor
    floor_weight: Tensor
    floor_bias: Tensor
    floor_centre: Tensor
    floor_spread: Tensor
    norm_centre: Tensor
    norm_spread: Tensor
    space_mean: Tensor
    space_turn: Tensor
    identity_mean: Tensor
    identity_spread: Tensor
    gallery: Tensor
    others: Tensor
    others_z: Tensor
    empty: Tensor
    moment: Tensor
    text_others: Tensor

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        self.facts = facts
        config = EncoderConfig(**facts.encoder)
        for i, (out, *inside) in enumerate(facts.modules.values()):
            self.register_buffer(f"left{i}", torch.zeros(out, min(out, facts.side)))
            width = int(torch.Size(inside).numel())
            self.register_buffer(f"right{i}", torch.zeros(width, min(width, facts.side)))
        targets = target_count(facts)
        for name, shape in {
            "floor_mean": (config.modules * config.core,), "floor_weight": (config.modules * config.core, targets),
            "floor_bias": (targets,), "floor_centre": (targets,), "floor_spread": (targets,),
            "norm_centre": (), "norm_spread": (), "space_mean": (facts.features,),
            "space_turn": (facts.features, facts.identity), "identity_mean": (facts.identity,), "identity_spread": (),
            "gallery": (facts.sizes["gallery"], facts.identity), "others": (facts.sizes["others"], facts.identity), "others_z": (facts.sizes.get("others_z", 0), config.latent),
            "empty": (facts.sizes["empty"],), "moment": (facts.drawn["conditioning"][1],) * 2,
            "text_others": (facts.sizes["text"], facts.drawn["conditioning"][1], TEXT_RANK),
        }.items():  # fmt: skip
            self.register_buffer(name, torch.zeros(shape))
        self.encoder = Encoder(config)
        self.heads = Heads(config.latent, facts.identity, facts.attributes)
        self.prompt = SoftPrompt(config.latent, facts.drawn["conditioning"][1])
        self.pictures = LatentDecoder(config.latent, facts.drawn["latents"])
        self.picture_set = (
            SetHead(config.latent, facts.identity, facts.picture_set) if facts.picture_set else None
        )

    @property
    def basis(self) -> Basis:
        names = list(self.facts.modules)
        sides = (
            {name: getattr(self, f"{side}{i}").float() for i, name in enumerate(names)}
            for side in ("left", "right")
        )
        return Basis(*sides)

    @property
    def floor(self) -> Floor:
        return Floor(self.floor_mean, self.floor_weight, self.floor_bias, 0.0)

    @property
    def space(self) -> IdentitySpace:
        return IdentitySpace(self.space_mean, self.space_turn)

    def tokens(self, weights: LoraWeights, denoiser: Denoiser | None = None) -> Tokens:
        """Tokens (1, …) of a LoRA of any layout.

        Raises:
            InputError: it is for another base, or adapts none of the modules known here.
        """
        if denoiser is not None:
            weights = weights.resolve(denoiser.module_shapes())
        base_weights = None
        if denoiser is not None and any(m.kind == "dora" for m in weights.modules.values()):
            unet = denoiser.unet
            base_weights = {
                name: unet.get_submodule(name.removeprefix("unet.")).weight.detach().cpu()
                for name in weights.modules if name.startswith("unet.")
            }  # fmt: skip
        return self.basis.of_lora(weights, base_weights)  # type: ignore[arg-type]

    @torch.no_grad()
    def read(self, tokens: Tokens, log_step: Tensor | None = None, batch: int = 256) -> Reading:
        """What the weights say; the step need not be known."""
        self.eval()
        parts = []
        for rows in torch.arange(len(tokens)).split(batch):
            parts.append(self._read(tokens.of(rows), None if log_step is None else log_step[rows]))
        first = parts[0]
        merged = {
            key: torch.cat([getattr(part, key) for part in parts])
            for key in vars(first)
            if key != "attributes"
        }
        shares = {
            key: torch.cat([part.attributes[key] for part in parts]) for key in first.attributes
        }
        return Reading(attributes=shares, **merged)

    def _read(self, tokens: Tokens, log_step: Tensor | None) -> Reading:
        floor = self.floor(tokens.cores)
        mu, logvar = self.encoder(self.standard(tokens), self.standard_floor(floor), log_step)
        found = self.heads(mu)
        identity = found["identity"]
        several = (
            identity.new_empty(len(identity), 0, identity.shape[1])
            if self.picture_set is None
            else self.picture_set(mu, identity)
        )
        shares = {name: found[f"attribute {name}"].softmax(1) for name in self.facts.attributes}
        return Reading(
            identity,
            several,
            shares,
            found["pictures"],
            found["steps"],
            found["subject"],
            mu,
            logvar,
            floor,
        )

    def standard(self, tokens: Tokens) -> Tokens:
        """With log norms about 0."""
        return Tokens(
            tokens.cores,
            (tokens.norms - self.norm_centre) / self.norm_spread,
            tokens.spectra,
            tokens.present,
        )

    def standard_floor(self, floor: Tensor) -> Tensor | None:
        if not self.encoder.config.floor:
            return None
        return (floor - self.floor_centre) / self.floor_spread

    def standard_identity(self, vectors: Tensor) -> Tensor:
        """Identity vectors (n, k) about the subjects' mean, in units of their spread."""
        return (vectors - self.identity_mean) / self.identity_spread

    def closeness(self, found: Tensor, wanted: Tensor) -> Tensor:
        """Cosines (n, m) of what was read (n, k) with subjects' vectors (m, k), both about the mean."""
        return F.normalize(found, dim=-1) @ F.normalize(wanted, dim=-1).T

    def save(self, path: Path) -> None:
        """In half precision, facts in the header."""
        from safetensors.torch import save_file

        tensors = {k: v.half().contiguous() for k, v in self.state_dict().items()}
        header = {"schema": SCHEMA, "facts": json.dumps(asdict(self.facts))}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, header)

    @classmethod
    def load(cls, path: str | Path) -> Inverter:
        """Raises InputError: the file is no inverter, or damaged."""
        from safetensors import safe_open

        try:
            with safe_open(str(path), "pt") as file:
                header = file.metadata() or {}
                if header.get("schema") != SCHEMA:
                    raise ValueError(f"schema {header.get('schema')!r}")
                inverter = cls(Facts(**json.loads(header["facts"])))
                # What an older diffward did not keep is empty.
                tensors = {k: v for k, v in inverter.state_dict().items() if not v.numel()}
                tensors |= {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
                inverter.load_state_dict(tensors)
        except Exception as error:
            told = " ".join(str(error).split())[:100]
            raise InputError(
                f"{path}: is no inverter ({told}); make one with diffward inverter train"
            ) from None
        return inverter.eval().requires_grad_(False)


def target_count(facts: Facts) -> int:
    """Numbers that the floor reads: identity, the attributes' values, log pictures, log steps, whether there is a subject."""
    return facts.identity + sum(map(len, facts.attributes.values())) + 3


def eye_print(eye: Eye) -> list[float]:
    """The first features of a fixed picture: another network, or other weights, see it otherwise."""
    ramp = np.linspace(0, 255, 64)
    picture = np.stack(
        [np.add.outer(ramp, ramp) / 2, np.add.outer(ramp, 0 * ramp), np.add.outer(0 * ramp, ramp)],
        -1,
    )
    return [round(float(v), 4) for v in eye.features(picture[None].astype(np.uint8))[0, :12]]


def check_eye(facts: Facts, eye: Eye) -> Eye:
    """The eye, if it is the one that the inverter learned with; InputError if not."""
    seen = eye_print(eye)
    if len(seen) != len(facts.eye_print) or not np.allclose(
        seen, facts.eye_print, rtol=0.02, atol=0.02
    ):
        raise InputError(
            f"--eye {eye.name}: is not the network that the inverter learned with ({facts.eye})"
        )
    return eye


@lru_cache(maxsize=4)
def facts_of(path: Path) -> Facts | None:
    """What an inverter's file says of itself; None where it is none."""
    from safetensors import safe_open

    try:
        with safe_open(str(path), "pt") as file:
            header = file.metadata() or {}
        return Facts(**json.loads(header["facts"])) if header.get("schema") == SCHEMA else None
    except Exception:
        return None


def shipped_inverter(denoiser: Denoiser) -> Inverter | None:
    """The inverter that comes with diffward for this very base, if there is one."""
    for path in sorted(SHIPPED.glob("*.safetensors")):
        facts = facts_of(path)
        if facts is not None and facts.base_identity == denoiser.unet_identity:
            return Inverter.load(path)
    return None


def open_inverter(path: str | Path | None, denoiser: Denoiser) -> Inverter | None:
    """The one at a path, or the shipped one for the base, if there is one.

    Raises:
        InputError: that at the path is for another base, or no inverter.
    """
    if path is None:
        return shipped_inverter(denoiser)
    inverter = Inverter.load(path)
    if inverter.facts.base_identity != denoiser.unet_identity:
        raise InputError(
            f"{path}: reads LoRAs of {inverter.facts.base} ({inverter.facts.base_identity}), the base is "
            f"{denoiser.public_name} ({denoiser.unet_identity}); train one for it: diffward zoo build, diffward inverter train"
        )
    return inverter
