"""Every layout is told by what is there; what cannot be used is named."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffward.data import load_pictures
from diffward.errors import InputError


def lines(path: Path, *rows: object) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def captions(pictures) -> dict[str, str]:
    return {picture.name: picture.caption for picture in pictures}


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_plain_pictures_in_stable_order(folder):
    root = folder("b.PNG", "a.jpg", "c/d.webp", "e.bmp", "f.gif", "g.tif", "h.JPEG")
    pictures = load_pictures(root, default_caption="a photo")
    assert [p.name for p in pictures] == sorted(p.name for p in pictures)
    assert len(pictures) == 7 and set(pictures.captions) == {"a photo"}
    assert pictures.layout == "folder of pictures: 7 pictures, no captions"
    assert all(p.repeats == 1 and len(p.sha256) == 64 for p in pictures)


def test_sidecars(folder):
    root = folder("a.png", "b.png", "c.png", "d.png")
    (root / "a.txt").write_text("  a dog,\n sitting ", encoding="utf-8")
    (root / "b.caption").write_text("\ufeffa cat", encoding="utf-8")
    (root / "c.txt").write_bytes("caf\xe9".encode("latin-1"))
    (root / "c.caption").write_text("not this one")
    (root / "stray.txt").write_text("nobody's")
    pictures = load_pictures(root, default_caption="none")
    assert captions(pictures) == {
        "a.png": "a dog, sitting",
        "b.png": "a cat",
        "c.png": "café",
        "d.png": "none",
    }
    assert pictures.layout == "folder with .caption and .txt captions: 4 pictures"
    assert "1 of 4 pictures have no caption file" in pictures.notes
    assert ("stray.txt", "caption file without its picture") in pictures.skipped


def test_kohya_repeat_folders(folder):
    root = folder("10_sks dog/a.png", "10_sks dog/b.png", "2_cat/c.png")
    (root / "10_sks dog" / "a.txt").write_text("sks dog on grass")
    pictures = load_pictures(root)
    assert captions(pictures) == {
        "10_sks dog/a.png": "sks dog on grass",
        "10_sks dog/b.png": "sks dog",
        "2_cat/c.png": "cat",
    }
    assert [p.repeats for p in pictures] == [10, 10, 2]
    assert "kohya repeat folders (2)" in pictures.layout and "sks" not in pictures.layout


def test_one_repeat_folder_given_itself(folder):
    root = folder("a.png", root="7_bird")
    (picture,) = load_pictures(root)
    assert (picture.repeats, picture.caption) == (7, "bird")


@pytest.mark.parametrize("names", [("2023_summer/a.png",), ("10_dog/a.png", "others/b.png")])
def test_folders_that_only_look_like_repeats(folder, names):
    pictures = load_pictures(folder(*names))
    assert all(p.repeats == 1 and p.caption == "" for p in pictures)


def test_metadata_jsonl(folder):
    root = folder("a.png", "sub/b.png", "left.png")
    lines(
        root / "metadata.jsonl",
        {"file_name": "sub/b.png", "text": "bee", "n": 1},
        {"file_name": "a.png", "text": None},
        {"file_name": "gone.png", "text": "x"},
    )
    pictures = load_pictures(root, default_caption="?")
    assert captions(pictures) == {"a.png": "?", "sub/b.png": "bee"}
    assert pictures.layout == (
        "imagefolder with metadata.jsonl: 2 pictures, captions from column 'text'"
    )
    assert dict(pictures.skipped) == {
        "gone.png": "listed in metadata.jsonl but not there",
        "left.png": "not listed in the metadata",
    }


def test_metadata_in_each_folder_and_windows_paths(folder):
    root = folder("x/a.png", "y/in/b.png")
    lines(root / "x/metadata.jsonl", {"file_name": "a.png", "text": "1"})
    lines(root / "y/metadata.jsonl", {"file_name": "in\\b.png", "text": "2"})
    assert captions(load_pictures(root)) == {"x/a.png": "1", "y/in/b.png": "2"}


def test_metadata_csv_with_named_columns(folder):
    root = folder("a.png", "b.png")
    (root / "metadata.csv").write_bytes(
        b'\xef\xbb\xbfimg,words\r\na.png,"one, two"\r\nb.png,"three\r\nfour"\r\n'
    )
    pictures = load_pictures(root, image_column="img", caption_column="words")
    assert captions(pictures) == {"a.png": "one, two", "b.png": "three four"}
    for options in ({}, {"image_column": "img", "caption_column": "text"}):
        with pytest.raises(InputError, match="'img', 'words'") as error:
            load_pictures(root, **options)
        one_line(error)


def test_jsonl_wins_over_csv_and_other_usual_columns_are_found(folder):
    root = folder("a.png")
    lines(root / "metadata.jsonl", {"file_name": "a.png", "prompt": "p", "caption": "c"})
    (root / "metadata.csv").write_text("file_name,text\na.png,from csv\n")
    assert load_pictures(root).captions == ["c"]


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/x.png", "a/../../secret.png", "..\\secret.png", "C:\\x.png"]
)
def test_metadata_cannot_leave_the_folder(folder, name):
    root = folder("a.png")
    folder("secret.png", root=".")
    lines(root / "metadata.jsonl", {"file_name": "a.png"}, {"file_name": name})
    with pytest.raises(InputError, match=r"line 2 names .* leaves the folder") as error:
        load_pictures(root)
    one_line(error)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'{"file_name": "a.png"}\n{"file_name":', "line 2 is not JSON"),
        (b"[1, 2]", "line 1 is a list"),
        (b'{"file_name": 3}', "line 1 names no picture"),
        (b"\n\n", "holds no rows"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_broken_metadata_is_one_line(folder, content, what):
    root = folder("a.png")
    (root / "metadata.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=what) as error:
        load_pictures(root)
    one_line(error)


def test_columns_without_metadata(folder):
    with pytest.raises(InputError, match="'words' was named but there is no metadata"):
        load_pictures(folder("a.png"), caption_column="words")


def test_odd_files_are_named(folder):
    root = folder("good.png", ".hidden.png")
    (root / "empty.png").touch()
    (root / "words.jpg").write_text("no picture at all")
    (root / "phone.heic").write_bytes(b"x")
    (root / "notes.pdf").write_bytes(b"x")
    (root / "cut.jpg").write_bytes(jpeg_bytes(root)[:900])
    (root / "dangling.png").symlink_to(root / "nowhere.png")
    os.mkfifo(root / "pipe.png")
    pictures = load_pictures(root)
    skipped = dict(pictures.skipped)
    assert [p.name for p in pictures] == ["good.png"]
    assert skipped.keys() == {
        "empty.png", "words.jpg", "phone.heic", "notes.pdf", "cut.jpg", "dangling.png", "pipe.png",
    }  # fmt: skip
    assert "zero bytes" in skipped["empty.png"]
    assert "not a picture in a format" in skipped["words.jpg"]
    assert "convert it" in skipped["phone.heic"]
    assert "truncated" in skipped["cut.jpg"]
    assert skipped["pipe.png"] == "not a regular file"


def jpeg_bytes(root: Path) -> bytes:
    path = root.parent / "whole.jpg"
    Image.effect_noise((64, 64), 60).save(path)
    return path.read_bytes()


def test_nothing_to_load_is_one_line(folder, tmp_path):
    (tmp_path / "bare").mkdir()
    only_broken = tmp_path / "broken"
    only_broken.mkdir()
    (only_broken / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    file = folder("a.png") / "a.png"
    cases = {
        tmp_path / "bare": "no pictures in it",
        tmp_path / "missing": "no such folder",
        file: "is a file, not a folder",
        only_broken: "none of its 1 pictures can be read",
    }
    for source, what in cases.items():
        with pytest.raises(InputError, match=what) as error:
            load_pictures(source)
        assert str(source) in one_line(error)


def test_limit_is_the_same_sample_each_time(folder):
    root = folder(*[f"{kind}_{i}.png" for kind in "ab" for i in range(10)])
    some = load_pictures(root, limit=8)
    assert [p.name for p in some] == [p.name for p in load_pictures(root, limit=8)]
    assert [p.name for p in some] == sorted(p.name for p in some)
    assert {p.name[0] for p in some} == {"a", "b"}, "not the first ones only"
    assert "limited to 8 of 20 pictures" in some.notes
    (root / some[0].name).write_bytes(b"broken")
    assert len(load_pictures(root, limit=8)) == 8, "a broken one is made up for"
    with pytest.raises(InputError, match="limit 0"):
        load_pictures(root, limit=0)


def test_copies_are_noted_and_subsets(folder):
    root = folder("a.png", "b.png")
    (root / "c.png").write_bytes((root / "a.png").read_bytes())
    pictures = load_pictures(root)
    assert "1 files are exact copies of others" in pictures.notes
    assert [p.name for p in pictures.at([2, 0])] == ["c.png", "a.png"]
    assert [p.name for p in pictures[1:]] == ["b.png", "c.png"]
    back = pictures.with_hashes([pictures[1].sha256, pictures[2].sha256])
    assert [p.name for p in back] == ["b.png", "a.png"], "one file a hash, in the order asked"
    with pytest.raises(InputError, match="1 of 1 pictures of the split"):
        pictures.with_hashes(["0" * 64])


class FakeRows:
    def __init__(self, rows: list[dict]) -> None:
        self.rows, self.column_names = rows, list(rows[0])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]

    def cast_column(self, column: str, feature: object) -> FakeRows:
        assert column in self.column_names and feature == "undecoded"
        return self


def fake_datasets(monkeypatch, answer) -> None:
    module = types.ModuleType("datasets")
    module.load_dataset = answer  # type: ignore[attr-defined]
    module.Image = lambda decode: "undecoded"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_hub_dataset(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFWARD_CACHE", str(tmp_path / "cache"))
    root = folder("a.png", "b.png")
    rows = [{"image": {"bytes": (root / n).read_bytes()}, "text": n} for n in ("a.png", "b.png")]
    rows.append({"image": None, "text": "nothing"})
    fake_datasets(monkeypatch, lambda name: {"train": FakeRows(rows)})
    pictures = load_pictures("someone/things")
    assert pictures.captions == ["a.png", "b.png"]
    assert pictures.layout == (
        "hub dataset, split 'train': 2 pictures, captions from column 'text'"
    )
    assert pictures.skipped == [("train/0000002", "holds no picture")]
    assert (pictures.pixels(16) == load_pictures(root).pixels(16)).all()
    assert len(load_pictures("someone/things", limit=1)) == 1
    with pytest.raises(InputError, match=r"no column 'nope' \(its columns: image, text"):
        load_pictures("someone/things", caption_column="nope")


def test_hub_out_of_reach_is_one_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def offline(name: str) -> None:
        raise ConnectionError("Couldn't reach the Hub\nand a long story")

    fake_datasets(monkeypatch, offline)
    with pytest.raises(InputError, match="Couldn't reach the Hub") as error:
        load_pictures("someone/things")
    one_line(error)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"diffward\[hub\]") as error:
        load_pictures("someone/things")
    one_line(error)
    (tmp_path / "here").mkdir()
    with pytest.raises(InputError, match="no such folder; check the path"):
        load_pictures("here/missing")


def test_real_folders(shared):
    for name, count in (("clothing", 1192), ("logos", 1200)):
        pictures = load_pictures(shared / name)
        assert len(pictures) == count and all(pictures.captions)
    batch = pictures[:3].pixels(64)
    assert batch.shape == (3, 64, 64, 3) and batch.dtype == np.uint8
    assert len(load_pictures(shared / "subjects")) == 104
