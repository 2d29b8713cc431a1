"""The closed-form edit against least squares solved another way, and token positions read by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffward.commands.cli import parse
from diffward.errors import InputError
from diffward.guard import GUARDS, GuardSettings, Subject
from diffward.guard.settings import PAIRINGS, TECHNIQUES, UceOptions
from diffward.guard.uce import Vectors, embed, solve, text_side, token_pairs
from diffward.models.features import encode_pictures
from diffward.models.parameters import parameters_of, put

CONCEPTS, GUIDE = ["red cup", "a dog"], "a blue boat"


def subject_of(
    denoiser: Any, pictures: Any, concepts: list[str], guide: str, **options: Any
) -> Subject:
    features = encode_pictures(denoiser, pictures, cache=False)
    settings = GuardSettings(uce=UceOptions(**options))
    return Subject(denoiser, features, features, settings, concepts=concepts, guide=guide)


def edit(denoiser: Any, pictures: Any, **options: Any) -> dict[str, torch.Tensor]:
    subject = subject_of(denoiser, pictures, CONCEPTS, GUIDE, **options)
    edited = GUARDS["uce"].obj(subject).edited
    assert edited is not None
    return edited


def read(denoiser: Any, text: str) -> tuple[torch.Tensor, int]:
    """Embeddings (L, D) of one text alone, and where its last word ends, read off the tokens."""
    tokenizer = denoiser.tokenizer
    ids = tokenizer(text, padding="max_length", max_length=12).input_ids
    tokens = tokenizer.convert_ids_to_tokens(ids)
    words = [i for i, token in enumerate(tokens) if not token.startswith("<|")]
    with torch.no_grad():
        rows = denoiser.text_encoder(torch.tensor([ids])).last_hidden_state[0]
    return rows.double(), words[-1] if words else 0


def least_squares(
    denoiser: Any, weight: torch.Tensor, pairing: str, technique: str, kept: list[str], lam: float,
    erase: float, preserve: float,
) -> torch.Tensor:  # fmt: skip
    """argmin of the objective, from its stacked rows."""
    w0 = weight.double()
    left, right = [lam**0.5 * torch.eye(w0.shape[1]).double()], [lam**0.5 * w0.T]
    g, last_g = read(denoiser, GUIDE)
    for concept in CONCEPTS:
        c, last_c = read(denoiser, concept)
        i, j = last_c, last_g
        while i < 12 and j < 12:
            want = w0 @ g[j]
            if technique == "tensor":
                own = w0 @ c[i]
                want = want - own * (own @ want) / (own @ own)
            left.append(erase**0.5 * c[i, None])
            right.append(erase**0.5 * want[None])
            i, j = i + 1, j + 1
            if pairing == "last-token":
                break
    for text in kept:
        p, last = read(denoiser, text)
        for row in p if pairing == "last-to-padding" else p[last, None]:
            left.append(preserve**0.5 * row[None])
            right.append(preserve**0.5 * (w0 @ row)[None])
    return torch.linalg.lstsq(torch.cat(left), torch.cat(right), driver="gelsd").solution.T


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_it_is_the_minimiser_of_its_objective(
    denoiser: Any, pictures: Any, pairing: str, technique: str
) -> None:
    base = {n: p.detach().clone() for n, p in parameters_of(denoiser.unet).items()}
    kept = ["a green cup", "a hat"]
    edited = edit(
        denoiser,
        pictures,
        pairing=pairing,
        technique=technique,
        preserve=kept,
        lam=0.3,
        erase_scale=2.0,
    )
    if pairing == "last-to-padding":
        kept, scale = [*kept, ""], 1 / 3
    else:
        scale = 1.0
    for name, new in edited.items():
        told = least_squares(denoiser, base[name], pairing, technique, kept, 0.3, 2.0, scale)
        assert torch.allclose(new.double(), told, atol=1e-5)
        assert not torch.allclose(new, base[name], atol=1e-3)


def test_the_gradient_of_the_objective_is_zero_there() -> None:
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    vectors = Vectors(draw(5, 8), draw(5, 8), draw(7, 8), 0.7)
    w0 = draw(6, 8)
    w = solve([w0], vectors, UceOptions(lam=0.2, erase_scale=1.5))[0].requires_grad_(True)
    loss = (
        0.2 * ((w - w0) ** 2).sum()
        + 1.5 * ((vectors.erased @ w.T - vectors.guide @ w0.T) ** 2).sum()
        + 0.7 * ((vectors.kept @ (w - w0).T) ** 2).sum()
    )
    loss.backward()
    assert w.grad is not None and float(w.grad.abs().max()) < 1e-10


def test_without_a_tie_to_the_base_concepts_answer_as_the_guide_and_the_preserved_stay(
    denoiser: Any, pictures: Any
) -> None:
    base = {n: p.detach().double().clone() for n, p in text_side(denoiser).items()}
    edited = edit(denoiser, pictures, pairing="last-token", preserve=["a hat"], lam=1e-8)
    g, last_g = read(denoiser, GUIDE)
    p, last_p = read(denoiser, "a hat")
    for name, new in edited.items():
        w0, w = base[name], new.double()
        for concept in CONCEPTS:
            c, last_c = read(denoiser, concept)
            assert torch.allclose(w @ c[last_c], w0 @ g[last_g], atol=1e-4)
            assert not torch.allclose(w0 @ c[last_c], w0 @ g[last_g], atol=1e-2)
        assert torch.allclose(w @ p[last_p], w0 @ p[last_p], atol=1e-4)


def test_only_keys_and_values_of_the_cross_attention_change(denoiser: Any, pictures: Any) -> None:
    before = {n: p.detach().clone() for n, p in denoiser.unet.named_parameters()}
    edited = edit(denoiser, pictures)
    assert all(torch.equal(p, before[n]) for n, p in denoiser.unet.named_parameters())
    wanted = {
        f"{name}.{leaf}.weight"
        for name, module in denoiser.unet.named_modules()
        if name.endswith("attn2")
        for leaf in ("to_k", "to_v")
        if hasattr(module, leaf)
    }
    assert set(edited) == wanted and len(wanted) >= 2
    put(denoiser.unet, edited)
    for name, parameter in denoiser.unet.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in wanted)
        assert parameter.dtype == before[name].dtype


@pytest.mark.parametrize(
    ("concept", "guide"), [("red cup", "a"), ("a", "red cup"), ("dog", ""), ("cup", "hat")]
)
def test_tokens_are_those_that_a_reader_picks(denoiser: Any, concept: str, guide: str) -> None:
    c, last_c = read(denoiser, concept)
    g, last_g = read(denoiser, guide)
    one = embed(denoiser, [concept], guide, UceOptions(pairing="last-token"))
    assert torch.allclose(one.erased, c[last_c, None], atol=1e-6)
    assert torch.allclose(one.guide, g[last_g, None], atol=1e-6)
    assert one.kept.shape == (0, 16)
    # Both tails of the same length, each from its last word on; the later one reaches to the end.
    many = embed(denoiser, [concept], guide, UceOptions(pairing="last-to-padding"))
    count = min(12 - last_c, 12 - last_g)
    assert torch.allclose(many.erased, c[last_c : last_c + count], atol=1e-6)
    assert torch.allclose(many.guide, g[last_g : last_g + count], atol=1e-6)
    assert torch.allclose(many.kept, read(denoiser, "")[0], atol=1e-6)
    assert many.kept_scale == 1.0


def test_pairs_by_hand() -> None:
    assert token_pairs(2, 4, 6, "last-token") == ([2], [4])
    assert token_pairs(2, 4, 6, "last-to-padding") == ([2, 3], [4, 5])
    assert token_pairs(4, 2, 6, "last-to-padding") == ([4, 5], [2, 3])


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_all_layers_at_once_equal_one_by_one(denoiser: Any, technique: str) -> None:
    options = UceOptions(technique=technique)
    weights = [w.detach().double() for w in text_side(denoiser).values()]
    vectors = embed(denoiser, CONCEPTS, GUIDE, options)
    for whole, weight in zip(solve(weights, vectors, options), weights, strict=True):
        (alone,) = solve([weight], vectors, options)
        assert torch.allclose(whole, alone, atol=1e-12, rtol=0)


def test_every_text_is_encoded_once(denoiser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    condition = denoiser.condition
    monkeypatch.setattr(denoiser, "condition", lambda texts: seen.extend(texts) or condition(texts))
    embed(denoiser, [*CONCEPTS, *CONCEPTS], GUIDE, UceOptions(preserve=["a hat", "", "a hat"]))
    assert sorted(seen) == sorted([*CONCEPTS, GUIDE, "a hat", ""])


def test_facts_say_how_far_it_came_and_no_word(denoiser: Any, pictures: Any) -> None:
    subject = subject_of(denoiser, pictures, CONCEPTS, GUIDE, pairing="last-token", lam=1e-8)
    facts = GUARDS["uce"].obj(subject).facts
    assert facts["erased_left"] < 1e-3 and facts["concepts"] == 2 and facts["preserved"] == 0
    assert "cup" not in str(facts)
    tied = subject_of(denoiser, pictures, CONCEPTS, GUIDE, pairing="last-token", lam=1e6)
    assert GUARDS["uce"].obj(tied).facts["erased_left"] > 0.99


@pytest.mark.parametrize(
    ("concepts", "guide", "options", "told"),
    [
        ([], "a hat", {}, "--concepts"),
        (["a dog of many words"], "a hat", {}, "takes 10"),
        (["a dog"], "a boat of many words", {}, "takes 10"),
        (["A  Dog"], "a dog", {}, "is the guide"),
        (["a dog", " "], "a hat", {}, "no word"),
        (["a dog"], "a hat", {"preserve": ["a dog"]}, "--uce.preserve"),
    ],
)
def test_bad_words_are_refused(
    denoiser: Any, pictures: Any, concepts: list[str], guide: str, options: Any, told: str
) -> None:
    with pytest.raises(InputError, match=told):
        GUARDS["uce"].obj(subject_of(denoiser, pictures, concepts, guide, **options))


@pytest.mark.parametrize(
    "options",
    [{"pairing": "all"}, {"technique": "cut"}, {"lam": 0.0}, {"erase_scale": -1.0}, {"preserve_scale": -1.0}],
)  # fmt: skip
def test_bad_options_are_refused(options: Any) -> None:
    with pytest.raises(InputError, match="--uce"):
        UceOptions(**options)


def test_options_on_the_command_line(tmp_path: Path) -> None:
    def command(settings: GuardSettings) -> None: ...

    command.__annotations__["settings"] = GuardSettings
    args = ["--uce.pairing", "last-token", "--uce.preserve", '["a hat"]', "--imma.variant", "full"]
    settings = parse(command, "x", [*args, "--uce.preserve-empty", "true"])["settings"]
    assert settings.uce == UceOptions("last-token", preserve=["a hat"], preserve_empty=True)
    assert settings.imma.rates == (5e-6, 2e-5)
