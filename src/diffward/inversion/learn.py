"""Training an inverter from a zoo, offline: the base's UNet is not in the loop until the decoders are made."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from diffward.errors import InputError
from diffward.inversion.data import (
    GALLERY,
    OTHER_PICTURES,
    Data,
    gallery_numbers,
    gather,
    identity_vectors,
)
from diffward.inversion.encoder import EncoderConfig
from diffward.inversion.fit import Encode, fit_encoder
from diffward.inversion.floor import Floor
from diffward.inversion.identity import IdentitySpace, subject_features
from diffward.inversion.inverter import Facts, Inverter, eye_print
from diffward.inversion.judge import held_out
from diffward.inversion.prompt import KEYS_AND_VALUES, strongest, zoo_evidence
from diffward.inversion.sets import SIZE, picture_vectors
from diffward.inversion.subjects import WORLD, open_subjects, public_subjects
from diffward.inversion.teach import Pupil, train_latents, train_prompt, train_set
from diffward.inversion.tokens import SIDE, Basis

if TYPE_CHECKING:
    from diffward.inversion.subjects import Subjects
    from diffward.inversion.zoo import Zoo
    from diffward.models.denoiser import Denoiser
    from diffward.models.eyes import Eye


OTHERS_Z = 4  # held-out LoRAs of fictional subjects of which z is kept
TEXTS = 99  # held-out LoRAs of which it is kept along which words they learned


@dataclass
class InverterSettings:
    """How the network learns."""

    epochs: int = 25
    batch: int = 64
    lr: float = 4e-4
    weight_decay: float = 0.2
    noise: float = 0.7
    """noise on the cores, in units of their spread"""
    width: int = 64
    layers: int = 2
    dropout: float = 0.4
    side: int = SIDE
    """vectors in each basis of a module"""
    kl: float = 1e-3
    """weight of the KL term; 0 leaves it out"""
    free: float = 0.05
    """nats a dimension of z may hold for nothing"""
    step_token: bool = True
    """the fine-tuning step is an input, left out half the time"""
    floor: bool = True
    """start from what ridge regression reads"""
    saves: str = "all"
    """learn from all saves of a LoRA, or its last"""
    prompt_steps: int = 1200
    """steps of the decoder that writes a caption from z; 0: none"""
    latent_steps: int = 1500
    """steps of the decoder that gives latents from z"""
    set_steps: int = 1000
    """steps of the head that gives a vector for single pictures from z"""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.saves not in ("all", "last"):
            raise InputError(f"--saves {self.saves}: choose all or last")
        for name in ("epochs", "batch", "width", "layers", "side"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.width % 4:
            raise InputError(f"--width {self.width}: must be a multiple of 4")
        if not 0 <= self.dropout < 1 or not self.lr > 0:
            raise InputError(
                f"--dropout {self.dropout}, --lr {self.lr}: must be in [0, 1), and above 0"
            )
        for name in (
            "weight_decay", "noise", "kl", "free", "prompt_steps", "latent_steps", "set_steps", "seed"
        ):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise InputError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: must be 0 or above"
                )


@dataclass
class Material:
    """All that training needs of a zoo: made once, however many networks learn from it."""

    zoo: Zoo
    subjects: Subjects
    eye: Eye
    basis: Basis
    space: IdentitySpace
    train: Data
    valid: Data
    test: Data
    gallery: Tensor


def prepare(
    zoo: Zoo, eye: Eye, side: int = SIDE, empty: Sequence[Zoo] = (), strangers: int = GALLERY
) -> Material:
    """Bases, identity vectors and tokens of a zoo, and of zoos of LoRAs that hold no subject of its kind.

    Raises:
        InputError: too few LoRAs to learn from and to judge by.
    """
    subjects = open_subjects(zoo.head.subjects, seed=zoo.head.seed, side=zoo.head.resolution)
    if zoo.head.subjects_digest != subjects.digest:
        raise InputError(
            f"{zoo.head.subjects}: its folders or pictures are not those that {zoo.folder} was built from; put them back"
        )
    splits = {name: zoo.of_split(name) for name in ("train", "valid", "test")}
    for name, least in (("train", 20), ("valid", 2), ("test", 2)):
        if (count := len({row.identity for row in splits[name]})) < least:
            raise InputError(
                f"{zoo.folder}: {count} subjects of the {name} split, at least {least} are needed; make it grow"
            )
    for other in empty:
        if (other.head.base_identity, other.head.modules) != (
            zoo.head.base_identity,
            zoo.head.modules,
        ):
            raise InputError(
                f"{other.folder}: its LoRAs are for another base, or adapt other modules, than those of {zoo.folder}"
            )
    basis = Basis.fit(zoo, zoo.last_saves(splits["train"]), side)
    known = sorted({row.identity for row in splits["train"]})
    features = subject_features(subjects, known, eye, OTHER_PICTURES)
    space = IdentitySpace.fit(features)
    vectors = {number: space.of(one) for number, one in zip(known, features, strict=True)}
    held = [row.identity for name in ("valid", "test") for row in splits[name]]
    vectors |= identity_vectors(subjects, held, eye, space)
    count = len(zoo.head.attributes)
    data = {}
    for name, rows in splits.items():
        data[name] = gather(zoo, rows, basis, vectors, space.size, count)
        for other in empty:
            if rows := other.of_split(name):
                data[name] = data[name].join(gather(other, rows, basis, None, space.size, count))
    gallery = identity_vectors(subjects, gallery_numbers(subjects, zoo, strangers), eye, space)
    return Material(
        zoo, subjects, eye, basis, space, data["train"], data["valid"], data["test"], torch.stack(list(gallery.values())),
    )  # fmt: skip


def train_inverter(
    material: Material, settings: InverterSettings, work: Path, denoiser: Denoiser | None = None
) -> Inverter:
    """The floor in closed form, the encoder, and (with a base) the decoders; resumable from `work`."""
    data = material.train
    if settings.saves == "last":
        data = data.last(None)
    inverter, unseen = _start(material, data, settings, denoiser)
    run = _run_identity(material, settings)
    inverter.train()
    fit_encoder(
        inverter.heads,
        inverter.encoder,
        _noisy(inverter, data, unseen, settings),
        data,
        inverter.standard_identity(data.identity),
        settings,
        work,
        run,
    )
    inverter.eval()
    with torch.no_grad():
        z = _encode(inverter, data, unseen)
    if settings.set_steps:
        sets = _sets(inverter, material, data)
        train_set(inverter, sets, z, settings.set_steps, work, run, settings.seed)
    if denoiser is not None:
        pupil = Pupil(inverter, data, z, material.subjects, denoiser, work, run, settings.seed)
        train_latents(pupil, settings.latent_steps)
        if settings.prompt_steps:
            train_prompt(pupil, settings.prompt_steps)
    _finish(inverter, material, data, unseen)
    return inverter.eval().requires_grad_(False)


@torch.no_grad()
def _finish(inverter: Inverter, material: Material, data: Data, unseen: Tensor) -> None:
    """What is known only of the trained network: readings of held-out LoRAs, and how good they are."""
    inverter.others.copy_(
        inverter.floor(material.valid.last().tokens.cores)[:, : inverter.facts.identity]
    )
    inverter.others_z.copy_(
        inverter.read(material.valid.last().tokens).mu[: len(inverter.others_z)]
    )
    inverter.empty.copy_(_empty_scores(inverter, material, data, unseen))
    _text(inverter, material.zoo)
    inverter.facts = replace(inverter.facts, held_out=held_out(inverter, material))


def _empty_scores(inverter: Inverter, material: Material, data: Data, unseen: Tensor) -> Tensor:
    """What the floor says of a subject in LoRAs that hold none, each unseen: out of fold, or of the validation part."""
    place = {id(row): i for i, row in enumerate(data.rows)}
    train = unseen[[place[id(row)] for row in data.last(subject=False).rows], -1]
    return torch.cat(
        [train, inverter.floor(material.valid.last(subject=False).tokens.cores)[:, -1]]
    )


def _text(inverter: Inverter, zoo: Zoo) -> None:
    """What LoRAs learn along in the mean, and what some held-out ones do, for the question of words."""
    if not len(inverter.text_others):
        return
    train, valid = (zoo.last_saves(zoo.of_split(split)) for split in ("train", "valid"))
    moments = zoo_evidence(zoo, train[:400])
    assert moments is not None
    inverter.moment.copy_(moments.mean(0))
    some = zoo_evidence(zoo, valid[: len(inverter.text_others)])
    assert some is not None
    inverter.text_others.copy_(strongest(some, inverter.text_others.shape[2]))


def _start(
    material: Material, data: Data, settings: InverterSettings, denoiser: Denoiser | None
) -> tuple[Inverter, Tensor]:
    """The inverter with everything but what is learned by steps; and the floor's out-of-fold answers."""
    head, attributes = material.zoo.head, material.zoo.head.attributes
    identity = data.identity[data.subject > 0]
    centre, spread = identity.mean(0), identity.std(0).mean()
    wanted = (data.identity - centre) / spread
    values = [_one_hot(data.labels[:, i], len(v)) for i, v in enumerate(attributes.values())]
    facts = [data.log_pictures[:, None], data.log_steps[:, None], data.subject[:, None]]
    targets = torch.cat([wanted, *values, *facts], 1)
    floor, unseen = Floor.fit(data.tokens.cores, targets, data.groups)
    modules, core = data.tokens.cores.shape[1], data.tokens.cores[0, 0].numel()
    config = EncoderConfig(
        modules, core, targets.shape[1] if settings.floor else 0, width=settings.width, layers=settings.layers,
        dropout=settings.dropout, step_token=settings.step_token,
    )  # fmt: skip
    drawn: dict[str, list[int]] = {"conditioning": [1, 1], "latents": [1, 1, 1]}
    if denoiser is not None:
        drawn = {
            "conditioning": list(denoiser.condition([""]).shape[1:]),
            "latents": list(denoiser.latent_shape),
        }
    sizes = {
        "gallery": len(material.gallery),
        "others": len(material.valid.last()),
        # Real people's are not passed on: whoever audits would see strangers drawn.
        "others_z": min(OTHERS_Z * head.subjects.startswith(WORLD), len(material.valid.last())),
        "empty": len(data.last(subject=False)) + len(material.valid.last(subject=False)),
        "text": 0,
    }
    if denoiser is not None and any(name.endswith(KEYS_AND_VALUES) for name in head.modules):
        sizes["text"] = min(TEXTS, sizes["others"])
    torch.manual_seed(settings.seed)
    inverter = Inverter(Facts(
        base=head.base, base_identity=head.base_identity, modules=head.modules, side=settings.side, eye=material.eye.name, eye_print=eye_print(material.eye),
        features=len(material.space.mean), identity=material.space.size, attributes=attributes, encoder=asdict(config),
        drawn=drawn, held_out={}, sizes=sizes, picture_set=SIZE if settings.set_steps else 0,
        zoo={"subjects": public_subjects(head.subjects), "loras": len({r.lora for r in material.zoo.rows}), "ranges": head.ranges, "seed": head.seed},
    ))  # fmt: skip
    with torch.no_grad():
        for i, name in enumerate(head.modules):
            getattr(inverter, f"left{i}").copy_(material.basis.left[name])
            getattr(inverter, f"right{i}").copy_(material.basis.right[name])
        for name, value in {
            "floor_mean": floor.mean, "floor_weight": floor.weight, "floor_bias": floor.bias,
            "floor_centre": unseen.mean(0), "floor_spread": unseen.std(0).clamp_min(1e-3),
            "norm_centre": data.tokens.norms.mean(), "norm_spread": data.tokens.norms.std().clamp_min(1e-3),
            "space_mean": material.space.mean, "space_turn": material.space.turn, "identity_mean": centre,
            "identity_spread": spread, "gallery": (material.gallery - centre) / spread,
        }.items():  # fmt: skip
            getattr(inverter, name).copy_(value)
        if settings.floor:
            _heads_at_floor(inverter)
    return inverter, unseen


def _heads_at_floor(inverter: Inverter) -> None:
    """Heads that at first say what the floor says; the shares of an attribute's values, sharpened, are its logits."""
    heads, centre, spread = inverter.heads, inverter.floor_centre, inverter.floor_spread
    linear = [(heads.identity, 1.0), *((head, 8.0) for head in heads.of_attributes())]
    place = 0
    for head, gain in linear:
        part = slice(place, place + head.out_features)
        head.weight.zero_()
        head.weight[:, part] = torch.diag(spread[part]) * gain
        head.bias.copy_(centre[part] * gain)
        place = part.stop
    heads.counts.weight.zero_()
    heads.counts.weight[0, place], heads.counts.weight[1, place + 1] = (
        spread[place],
        spread[place + 1],
    )
    heads.counts.bias.copy_(centre[place : place + 2])


def _noisy(inverter: Inverter, data: Data, unseen: Tensor, settings: InverterSettings) -> Encode:
    """How training sees a row: with noise on the cores, and with what the floor says of it unseen."""
    noise = settings.noise * data.tokens.cores.float().std()
    tokens, floor = inverter.standard(data.tokens), inverter.standard_floor(unseen)

    def encode(rows: Tensor, log_step: Tensor) -> tuple[Tensor, Tensor]:
        some = tokens.of(rows)
        cores = some.cores.float()
        some = replace(some, cores=cores + noise * torch.randn_like(cores))
        mu, logvar = inverter.encoder(some, None if floor is None else floor[rows], log_step)
        return mu, logvar

    return encode


def _sets(inverter: Inverter, material: Material, data: Data) -> Tensor:
    """Of each row the standardised vectors (n, P, k) of its training pictures, NaN where it has fewer, or no subject."""
    there = (data.subject > 0).nonzero()[:, 0]
    rows = [data.rows[i] for i in there.tolist()]
    vectors = picture_vectors(material.subjects, rows, material.eye, material.space)
    found = torch.full((len(data), *vectors.shape[1:]), torch.nan)
    found[there] = inverter.standard_identity(vectors)
    return found


def _encode(inverter: Inverter, data: Data, unseen: Tensor) -> Tensor:
    """z (n, latent) of training rows, from what the floor says of them unseen."""
    floor, tokens = inverter.standard_floor(unseen), inverter.standard(data.tokens)
    return torch.cat([
        inverter.encoder(tokens.of(rows), None if floor is None else floor[rows])[0]
        for rows in torch.arange(len(data)).split(256)
    ])  # fmt: skip


def _one_hot(labels: Tensor, values: int) -> Tensor:
    """(n, values), NaN where the label is not known."""
    found = F.one_hot(labels.clamp_min(0), values).float()
    return found.masked_fill((labels < 0)[:, None], torch.nan)


def _run_identity(material: Material, settings: InverterSettings) -> str:
    """What a resumed training must share with the one that it goes on with."""
    rows = [(row.lora, row.step, row.shard) for row in material.train.rows]
    told = f"{asdict(settings)}{rows}{material.zoo.head}{material.eye.name}"
    return hashlib.sha256(told.encode()).hexdigest()[:16]
