"""What a split promises, whatever the seed, the sizes and the pictures."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageOps

from diffward.commands.split import split
from diffward.data import (
    Manifest,
    Pictures,
    load_pictures,
    manifest_from_folders,
    near_duplicate_groups,
    random_split,
    select,
)
from diffward.data.split import _by_number, _by_share, coin_split
from diffward.errors import InputError

from .conftest import photo


@pytest.fixture
def twins(folder) -> Pictures:
    """Twelve pictures, three of them with a mirror image, one with an exact copy."""
    root = folder(*[f"{i:02}.png" for i in range(12)])
    for i in range(3):
        ImageOps.mirror(photo(i)).save(root / f"mirror{i}.png")
    shutil.copy(root / "05.png", root / "copy.png")
    return load_pictures(root)


def crossing(pictures: Pictures, manifest: Manifest) -> list[list[int]]:
    members, others = set(manifest.members), set(manifest.non_members)
    groups = near_duplicate_groups(pictures)
    return [
        group
        for group in groups
        if {pictures[i].sha256 for i in group} & members
        and {pictures[i].sha256 for i in group} & others
    ]


@pytest.mark.parametrize("seed", range(12))
def test_split_by_share(twins, seed):
    manifest = random_split(twins, seed=seed)
    assert not set(manifest.members) & set(manifest.non_members)
    assert set(manifest.members) | set(manifest.non_members) == set(twins.hashes)
    assert crossing(twins, manifest) == []
    assert abs(len(manifest.members) - 7.5) <= 1
    assert manifest.groups == {
        "pictures": 16,
        "exact_copies": 1,
        "near_duplicate_groups": 3,
        "pictures_in_them": 6,
        "largest": 2,
        "left_out": 0,
    }
    assert manifest.seed == seed and manifest.source == twins.layout


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("members", "others"), [(5, 6), (1, 1), (7, None), (None, 4), (9, 6)])
def test_split_by_number(twins, seed, members, others):
    manifest = random_split(twins, n_members=members, n_non_members=others, seed=seed)
    if members:
        assert len(manifest.members) == members
    if others:
        assert len(manifest.non_members) == others
    assert not set(manifest.members) & set(manifest.non_members)
    assert crossing(twins, manifest) == []


def test_seeds_differ_and_file_order_has_no_say(twins):
    splits = {tuple(random_split(twins, seed=seed).members) for seed in range(10)}
    assert len(splits) == 10
    order = np.random.default_rng(0).permutation(len(twins))
    assert random_split(twins.at(order), seed=4).members == random_split(twins, seed=4).members


def test_every_picture_is_a_member_equally_often(folder):
    pictures = load_pictures(folder(*[f"{i}.png" for i in range(8)]))
    counts = dict.fromkeys(pictures.hashes, 0)
    for seed in range(200):
        for digest in random_split(pictures, seed=seed).members:
            counts[digest] += 1
    assert all(70 <= count <= 130 for count in counts.values())


def test_impossible_splits_are_one_line(twins, folder):
    for options, what in (
        ({"n_members": 14, "n_non_members": 5}, "not possible: there are 15 that differ"),
        ({"n_members": 15}, "not possible"),
        ({"n_members": 0}, "at least one picture"),
        ({"member_share": 1.0}, "between 0 and 1"),
    ):
        with pytest.raises(InputError, match=what) as error:
            random_split(twins, **options)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="one picture: a split needs"):
        random_split(load_pictures(folder("a.png", root="single")))
    alike = folder("a.png", root="alike")
    ImageOps.mirror(photo(0)).save(alike / "b.png")
    with pytest.raises(InputError, match="2 pictures, all near-duplicates"):
        random_split(load_pictures(alike))


sizes = st.lists(st.integers(1, 6), min_size=2, max_size=12)


def fake_groups(lengths: list[int]) -> list[list[str]]:
    return [[f"{g}.{i}" for i in range(n)] for g, n in enumerate(lengths)]


def check_sides(groups: list[list[str]], members: list[str], others: list[str]) -> None:
    assert len(set(members)) == len(members) and len(set(others)) == len(others)
    assert not {m.split(".")[0] for m in members} & {o.split(".")[0] for o in others}


@settings(max_examples=200, deadline=None)
@given(sizes, st.floats(0.05, 0.95))
def test_share_rule(lengths, share):
    groups = fake_groups(lengths)
    members, others = _by_share(groups, share * sum(lengths))
    check_sides(groups, members, others)
    assert members and others and len(members) + len(others) == sum(lengths)


@settings(max_examples=300, deadline=None)
@given(sizes, st.integers(1, 20), st.one_of(st.none(), st.integers(1, 20)))
def test_number_rule(lengths, n_members, n_others):
    groups = fake_groups(lengths)
    try:
        members, others = _by_number(groups, n_members, n_others, sum(lengths))
    except InputError:
        # Ones alone can always be dealt out.
        assert max(lengths) > 1 or n_members + (n_others or 1) > sum(lengths)
        return
    check_sides(groups, members, others)
    assert len(members) == n_members and others
    if n_others is not None:
        assert len(others) == n_others


def test_save_and_load(twins, tmp_path):
    manifest = random_split(twins, seed=3)
    manifest.crossing = [(manifest.members[0], manifest.non_members[0])]
    path = tmp_path / "deep" / "split.json"
    manifest.save(path)
    assert Manifest.load(path) == manifest
    text = path.read_text()
    assert json.loads(text)["schema"] == "diffward.split/1"
    assert str(tmp_path) not in text and ".png" not in text
    assert [p.name for p in path.parent.iterdir()] == ["split.json"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{", "not a JSON file"),
        ("[]", "not a split manifest"),
        ('{"schema": "diffward.report/1"}', "not a split manifest"),
        ('{"schema": "diffward.split/1", "members": ["x"]}', "'members' is not a list"),
        (
            json.dumps({"schema": "diffward.split/1", "members": ["a" * 64], "non_members": []}),
            "no non-members",
        ),
        (
            json.dumps(
                {"schema": "diffward.split/1", "members": ["a" * 64], "non_members": ["a" * 64]}
            ),
            "1 pictures are members and non-members at once: aaaaaaaaaaaa…",
        ),
    ],
)
def test_bad_manifests_are_one_line(tmp_path, content, what):
    path = tmp_path / "split.json"
    path.write_text(content)
    with pytest.raises(InputError, match=what) as error:
        Manifest.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_early_manifests_have_no_kind(twins, tmp_path):
    manifest = random_split(twins, seed=3)
    path = tmp_path / "split.json"
    manifest.save(path)
    content = json.loads(path.read_text())
    assert content.pop("kind") == "half"
    path.write_text(json.dumps(content))
    assert Manifest.load(path) == manifest and not manifest.is_coin
    for kind in ("dice", None, ["coin"]):
        path.write_text(json.dumps({**content, "kind": kind}))
        with pytest.raises(InputError, match="not half or coin") as error:
            Manifest.load(path)
        assert str(path) in str(error.value)


def test_missing_manifest(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        Manifest.load(tmp_path / "none.json")


@pytest.mark.parametrize("seed", range(12))
def test_coins(twins, seed, tmp_path):
    manifest = coin_split(twins, seed=seed)
    assert manifest.is_coin and manifest.kind == "coin" and manifest.seed == seed
    used = [*manifest.members, *manifest.non_members]
    # One picture of each group of near-duplicates has a coin, no more and no less.
    assert len(used) == len(set(used)) == 12 and set(used) <= set(twins.hashes)
    groups = near_duplicate_groups(twins)
    assert [len({twins[i].sha256 for i in group} & set(used)) for group in groups] == [1] * 12
    assert manifest.groups["left_out"] == 3 and manifest.groups["near_duplicate_groups"] == 3
    path = tmp_path / "split.json"
    manifest.save(path)
    assert Manifest.load(path) == manifest and json.loads(path.read_text())["kind"] == "coin"
    order = np.random.default_rng(seed).permutation(len(twins))
    again = coin_split(twins.at(order), seed=seed)
    assert (again.members, again.non_members) == (manifest.members, manifest.non_members)


def test_coins_are_fair_and_independent(folder):
    pictures = load_pictures(folder(*[f"{i}.png" for i in range(8)]))
    # All eight fell alike with seed 45.
    splits = [coin_split(pictures, seed=seed) for seed in range(121) if seed != 45]
    flips = np.array([np.isin(sorted(pictures.hashes), split.members) for split in splits], float)
    assert np.abs(flips.mean(axis=0) - 0.5).max() < 0.13
    # Numbers of heads as of coins, not 4 of 8 each time; pairs of pictures do not go together.
    assert flips.sum(axis=1).std() == pytest.approx(np.sqrt(2), abs=0.25)
    assert np.abs(np.corrcoef(flips.T) - np.eye(8)).max() < 0.3


def test_coins_that_fall_alike_are_one_line(folder):
    pictures = load_pictures(folder("a.png", "b.png"))
    with pytest.raises(InputError, match="all 2 coins fell alike with seed"):
        for seed in range(20):
            coin_split(pictures, seed=seed)
    with pytest.raises(InputError, match="one picture: a split needs"):
        coin_split(load_pictures(folder("a.png", root="single")))


def test_split_command_flips_coins(folder, tmp_path, capsys):
    root = folder(*[f"{i:02}.png" for i in range(8)])
    ImageOps.mirror(photo(0)).save(root / "mirror.png")
    out = tmp_path / "coins.json"
    split(str(root), str(out), canaries=True, seed=1)
    assert Manifest.load(out).is_coin
    assert "left out: 1 near-duplicates" in capsys.readouterr().out
    split(str(root), str(out))
    assert not Manifest.load(out).is_coin
    assert "left out" not in capsys.readouterr().out
    for option in ({"members": 3}, {"non_members": 3}, {"member_share": 0.3}):
        with pytest.raises(InputError, match=r"--canaries: .* no size") as error:
            split(str(root), str(out), canaries=True, **option)
        assert "\n" not in str(error.value)


def test_select(twins):
    manifest = random_split(twins, seed=1)
    members, others = select(twins, manifest)
    assert members.hashes == manifest.members and others.hashes == manifest.non_members
    with pytest.raises(InputError, match="are not among the 3 pictures given"):
        select(twins[:3], manifest)
    manifest.non_members.append(manifest.members[0])
    name = members[0].name
    with pytest.raises(InputError, match=f"at once: .*{name}"):
        select(twins, manifest)


def test_two_folders(folder):
    mine = load_pictures(folder("a.png", "b.png", root="mine"))
    other_root = folder("c.png", "d.png", root="others", first=2)
    manifest = manifest_from_folders(mine, load_pictures(other_root))
    assert sorted(manifest.members) == sorted(mine.hashes) and manifest.crossing == []

    ImageOps.mirror(photo(1)).save(other_root / "m.png")
    others = load_pictures(other_root)
    manifest = manifest_from_folders(mine, others)
    assert manifest.crossing == [(mine[1].sha256, others[2].sha256)]
    assert manifest.groups["crossing_pairs"] == 1

    shutil.copy(mine[0].path, other_root / "same.png")
    with pytest.raises(InputError, match=r"at once: a\.png = same\.png"):
        manifest_from_folders(mine, load_pictures(other_root))


def test_real_subjects_stay_on_one_side(shared):
    subjects = load_pictures(shared / "subjects")
    by_name = {picture.name: picture.sha256 for picture in subjects}
    for seed in range(5):
        members = set(random_split(subjects, seed=seed).members)
        assert (by_name["dog5/02.jpg"] in members) == (by_name["dog5/03.jpg"] in members)
        assert len({by_name[f"red_cartoon/0{i}.jpg"] in members for i in range(4)}) == 1
