"""Which text a part is: the cuts of every shape of source, a recipe's `data:`, fingerprints."""

import hashlib
import itertools
import json
import os
import random
from pathlib import Path

import datasets
import pytest

from compressor import data, sources
from compressor.data import PARTS, cuts, describe, overlap, recipe_text, specs, text
from compressor.errors import UserError

REAL = os.environ.get("GPT2_COMPRESS_TEST_DATA")
needs_real_data = pytest.mark.skipif(not REAL, reason="GPT2_COMPRESS_TEST_DATA is not set")


def write_rows(folder: Path, **counts: int) -> str:
    """A folder of .jsonl files, one a split; row i of split s is "s i"."""
    folder.mkdir(exist_ok=True)
    for split, count in counts.items():
        rows = ("{}\n".format(json.dumps({"text": f"{split} {i}"})) for i in range(count))
        (folder / f"{split}.jsonl").write_text("".join(rows))
    return str(folder)


def numbered(split: str, start: int, stop: int) -> list[str]:
    return [f"{split} {i}" for i in range(start, stop)]


def one_line(error) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


# ---------------------------------------------------------------- cuts


SHAPES = {
    ("train", "validation", "test"): {
        "calibration": numbered("train", 0, 20),
        "training": numbered("train", 20, 200),
        "selection": numbered("validation", 0, 200),
        "test": numbered("test", 0, 200),
    },
    ("train", "test"): {
        "calibration": numbered("train", 0, 20),
        "selection": numbered("train", 20, 40),
        "training": numbered("train", 40, 200),
        "test": numbered("test", 0, 200),
    },
    ("train", "test", "unsupervised"): {
        "calibration": numbered("train", 0, 20),
        "selection": numbered("train", 20, 40),
        "training": numbered("train", 40, 200),
        "test": numbered("test", 0, 200),
    },
    ("validation", "test"): {
        "calibration": numbered("validation", 0, 20),
        "selection": numbered("validation", 20, 40),
        "training": numbered("validation", 40, 200),
        "test": numbered("test", 0, 200),
    },
    ("train", "validation"): {
        "calibration": numbered("train", 0, 20),
        "training": numbered("train", 20, 200),
        "selection": numbered("validation", 0, 100),
        "test": numbered("validation", 100, 200),
    },
    **{
        (only,): {
            "calibration": numbered(only, 0, 16),
            "training": numbered(only, 16, 160),
            "selection": numbered(only, 160, 180),
            "test": numbered(only, 180, 200),
        }
        for only in ("train", "validation", "test", "reviews")
    },
}


@pytest.mark.parametrize("shape", SHAPES, ids="+".join)
def test_the_parts_of_every_shape_of_source(shape, tmp_path):
    folder = write_rows(tmp_path / "d", **dict.fromkeys(shape, 200))
    found = {part: list(text(folder, part).documents) for part in PARTS}
    assert found == SHAPES[shape]


@pytest.mark.parametrize("shape", SHAPES, ids="+".join)
@pytest.mark.parametrize("count", [11, 13, 57, 101])
def test_no_two_parts_share_a_row_and_none_of_the_used_is_lost(shape, count, tmp_path):
    folder = write_rows(tmp_path / "d", **dict.fromkeys(shape, count))
    found = [text(folder, part) for part in PARTS if not (len(shape) == 1 and count < 13 and part == "calibration")]
    documents = [document for piece in found for document in piece.documents]
    assert len(documents) == len(set(documents))
    if count >= 13:
        used = [split for split in shape if split != "unsupervised"]
        assert set(documents) == {row for split in used for row in numbered(split, 0, count)}
    for one, other in itertools.combinations(found, 2):
        assert not overlap(describe(one), describe(other))


def test_a_table_is_cut_as_a_folder_of_one(tmp_path):
    folder = write_rows(tmp_path / "d", reviews=200)
    assert list(text(f"{folder}/reviews.jsonl", "selection").documents) == numbered("reviews", 160, 180)
    assert text(f"{folder}/reviews.jsonl", "selection").split == "all[80%:90%]"


def test_rows_are_joined_with_a_blank_line_and_empty_rows_stay(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in ("", " = A = \n", "", "b")))
    piece = text(str(tmp_path / "a.jsonl"), "all")
    assert piece.documents == ("", " = A = \n", "", "b")
    assert piece.joined == "\n\n = A = \n\n\n\n\nb"


def prose(seed: int, length: int, blanks: str) -> str:
    dice = random.Random(seed)
    return "".join(dice.choice("abcdefghij\u00e9\u4e2d" + blanks) for _ in range(length))


@pytest.mark.parametrize("blanks", ["", " ", "\n", " \n", "\r\n\t \u2028"], ids=repr)
@pytest.mark.parametrize("length", [13, 50, 101, 999, 5000])
def test_the_parts_of_a_txt_add_up_to_it(blanks, length, tmp_path):
    content = prose(length, length, blanks)
    (tmp_path / "a.txt").write_bytes(content.encode())
    parts = [text(str(tmp_path / "a.txt"), part).documents for part in ("calibration", "training", "selection", "test")]
    assert all(len(documents) == 1 for documents in parts)
    assert "".join(documents[0] for documents in parts) == content


def test_a_txt_is_cut_near_the_percent_between_lines_or_words(tmp_path):
    lines = "".join(f"line {i:04} with some words\n" for i in range(1000))
    words = " ".join(f"word{i:04}" for i in range(1000))
    for name, content, behind, before in (("lines.txt", lines, "\n", "line"), ("words.txt", words, "", " word")):
        (tmp_path / name).write_text(content)
        position = 0
        for part, percent in (("calibration", 8), ("training", 80), ("selection", 90)):
            piece = text(str(tmp_path / name), part).joined
            position += len(piece)
            assert piece.endswith(behind) and content[position:].startswith(before)
            assert 0 <= position - len(content) * percent // 100 < 40
    (tmp_path / "short.txt").write_text("one two three four five six seven eight nine ten")
    assert text(str(tmp_path / "short.txt"), "selection").joined.split() == ["nine"]


def test_the_splits_of_txt_files(tmp_path):
    for stem, content in (("train", "a " * 500), ("valid", "b\n"), ("test", "\nc\r\n\n")):
        (tmp_path / f"{stem}.txt").write_bytes(content.encode())
    folder = str(tmp_path)
    assert text(folder, "calibration").joined + text(folder, "training").joined == "a " * 500
    assert text(folder, "selection").joined == "b\n"
    assert text(folder, "test").joined == text(folder, "all").joined == "\nc\r\n\n"


def test_everything(tmp_path):
    every = write_rows(tmp_path / "every", train=5, validation=5, test=5)
    assert list(text(every, "all").documents) == numbered("test", 0, 5)
    untested = write_rows(tmp_path / "untested", train=5, validation=5, extra=5)
    whole = text(untested, "all")
    assert list(whole.documents) == numbered("train", 0, 5) + numbered("validation", 0, 5)
    assert whole.split == "train+validation"
    single = write_rows(tmp_path / "single", reviews=5)
    assert list(text(single, "all").documents) == numbered("reviews", 0, 5)


def test_a_named_split_is_a_source_of_its_own(tmp_path):
    folder = write_rows(tmp_path / "d", train=10, test=10, unsupervised=200)
    assert list(text(folder, "calibration", split="unsupervised").documents) == numbered("unsupervised", 0, 16)
    assert list(text(folder, "all", split="train").documents) == numbered("train", 0, 10)
    with pytest.raises(UserError) as error:
        text(folder, "test", split="tests")
    assert "did you mean 'test'" in one_line(error) and "unsupervised" in str(error.value)


def test_what_has_no_text_or_no_split_is_one_line(tmp_path, monkeypatch):
    folder = write_rows(tmp_path / "d", reviews=5)
    with pytest.raises(UserError) as error:  # 8 % of 5 rows
        text(folder, "calibration")
    assert f"calibration part of {folder}" in one_line(error)
    for name, content in (("a.txt", ""), ("b.txt", " \n\n"), ("c.jsonl", '{"text": " "}\n')):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match="has no text"):
            text(str(tmp_path / name), "all")
    with pytest.raises(UserError, match="unknown data part 'train'"):
        text(folder, "train")
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict({"one": rows, "two": rows}))
    with pytest.raises(UserError) as error:
        text("someone/reviews", "all")
    assert "--split" in one_line(error) and "one, two" in str(error.value)
    assert text("someone/reviews", "all", split="two").documents == ("a",)


def test_the_demo(monkeypatch):
    import compressor.demo

    asked = []

    def rows(kind, split):
        asked.append((kind, split))
        return [{"text": f"{split} {i}", "kind": kind} for i in range(20)]

    monkeypatch.setattr(compressor.demo, "rows", rows)
    assert list(text("demo", "calibration").documents) == numbered("train", 0, 2)
    assert list(text("demo", "all").documents) == numbered("test", 0, 20)
    assert asked == [("lm", "train"), ("lm", "test")]


# ---------------------------------------------------------------- fingerprints and overlap


def test_the_fingerprint_is_of_the_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n{"text": "\\u00e9"}\n')
    piece = text(str(tmp_path / "a.jsonl"), "all")
    by_hand = b"\x02\0\0\0\0\0\0\0ab" + b"\x02\0\0\0\0\0\0\0\xc3\xa9"
    assert piece.fingerprint == hashlib.sha256(by_hand).hexdigest()
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": "b\\u00e9"}\n')
    assert text(str(tmp_path / "b.jsonl"), "all").fingerprint != piece.fingerprint
    described = describe(piece)
    assert described["fingerprint"] == piece.fingerprint and described["documents"] == 2
    assert (described["source"], described["part"], described["split"]) == (str(tmp_path / "a.jsonl"), "all", "all")
    assert json.loads(json.dumps(described)) == described


def test_overlap_sees_the_same_file_under_another_name(tmp_path):
    folder = write_rows(tmp_path / "d", train=50, validation=50, test=50)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((tmp_path / "d" / "train.jsonl").read_bytes())
    (tmp_path / "d2").mkdir()
    other = write_rows(tmp_path / "d2", train=51)
    trained = describe(text(folder, "training"))
    assert overlap(trained, describe(text(str(copy), "all")))
    assert overlap(trained, describe(text(f"{folder}/train.jsonl", "test")))
    assert overlap(describe(text(folder, "all")), describe(text(folder, "test")))
    assert not overlap(trained, describe(text(folder, "all")))
    assert not overlap(describe(text(folder, "calibration")), describe(text(str(copy), "test")))
    assert not overlap(trained, describe(text(other, "training")))


def test_overlap_on_the_hub_and_in_the_demo(monkeypatch):
    rows = {split: datasets.Dataset.from_dict({"text": [split] * 20}) for split in ("train", "test")}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(rows))
    assert overlap(describe(text("imdb", "test")), describe(text("stanfordnlp/imdb", "all")))
    first, second = describe(text("imdb", "training")), describe(text("wikitext", "training"))
    assert not overlap({**first, "fingerprint": "1"}, {**second, "fingerprint": "2"})


# ---------------------------------------------------------------- a recipe's data


def test_specs():
    assert specs("demo") == dict.fromkeys(PARTS, "demo")
    given = {"test": "t", "calibration": "c", "selection": "s", "training": "r"}
    assert specs(given) == given and list(specs(given)) == list(PARTS)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"calibration": "a"}, "selection, training, test"),
        ({**dict.fromkeys(PARTS, "a"), "tests": "a"}, "did you mean 'test'"),
        ({**dict.fromkeys(PARTS, "a"), "test": 3}, "data.test is 3"),
        ({**dict.fromkeys(PARTS, "a"), "test": None}, "data.test is None"),
        (3, "data is 3"),
        (None, "data is None"),
        (["a"], "mapping"),
        ({3: "a"}, "'3'"),
    ],
)
def test_wrong_specs_are_one_line(given, said):
    with pytest.raises(UserError) as error:
        specs(given)
    assert said in one_line(error)


def test_one_source_for_all_is_cut(tmp_path):
    folder = write_rows(tmp_path / "d", train=200, test=200)
    found = {part: list(recipe_text(folder, part).documents) for part in PARTS}
    assert found == SHAPES["train", "test"]


def test_a_source_for_one_part_is_used_whole_and_a_shared_one_is_cut(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    three = write_rows(tmp_path / "three", train=50, validation=50, test=50)
    single = write_rows(tmp_path / "single", reviews=200) + "/reviews.jsonl"
    given = {"calibration": three, "selection": single, "training": "single/../single/reviews.jsonl", "test": "demo"}
    assert list(recipe_text(given, "calibration").documents) == numbered("train", 0, 50)
    assert list(recipe_text(given, "selection").documents) == numbered("reviews", 160, 180)
    assert list(recipe_text(given, "training").documents) == numbered("reviews", 16, 160)
    for part, split in (("selection", "validation"), ("training", "train"), ("test", "test")):
        given = {**dict.fromkeys(PARTS, single), part: three}
        assert list(recipe_text(given, part).documents) == numbered(split, 0, 50)
    given = {**dict.fromkeys(PARTS, three), "test": single}
    assert list(recipe_text(given, "test").documents) == numbered("reviews", 0, 200)
    with pytest.raises(UserError, match="unknown data part 'all'"):
        recipe_text(given, "all")


def test_a_recipe_with_a_missing_file_fails_at_its_first_part(tmp_path):
    folder = write_rows(tmp_path / "d", train=200)
    given = {**dict.fromkeys(PARTS, folder), "test": str(tmp_path / "missing.txt")}
    with pytest.raises(UserError, match=r"missing\.txt"):
        recipe_text(given, "calibration")


def test_cuts_leave_room_for_the_search_of_a_line_end():
    # `_boundary` looks ahead by up to 8 %
    for shape in SHAPES:
        for split in shape:
            if split == "unsupervised":
                continue
            placed = [
                cut for cut in cuts([name for name in shape if name != "unsupervised"]).values() if cut.split == split
            ]
            edges = sorted({edge for cut in placed for edge in (cut.start, cut.stop)})
            assert edges[0] == 0 and edges[-1] == 100
            assert all(after - before >= 8 for before, after in itertools.pairwise(edges))


# ---------------------------------------------------------------- real data


@needs_real_data
def test_real_files():
    root = Path(REAL) / "data"
    whole = (root / "wikitext-2" / "validation.txt").read_bytes().decode()
    parts = [
        text(str(root / "wikitext-2" / "validation.txt"), part).joined
        for part in ("calibration", "training", "selection", "test")
    ]
    assert "".join(parts) == whole and all(piece.endswith("\n") for piece in parts)
    reviews = str(root / "imdb" / "unlabelled.parquet")
    assert {part: len(text(reviews, part).documents) for part in PARTS} == {
        "calibration": 480,
        "selection": 600,
        "training": 4320,
        "test": 600,
    }
    folder = str(root / "imdb")
    assert {part: len(text(folder, part).documents) for part in (*PARTS, "all")} == {
        "calibration": 250,
        "selection": 250,
        "training": 2000,
        "test": 2000,
        "all": 2000,
    }
    assert len(text(folder, "all", split="unlabelled").documents) == 6000
    news = text(str(root / "bbc-summary"), "all")  # columns document, summary
    assert len(news.documents) == 223 and min(map(len, news.documents)) > 500


def test_names_of_the_package():
    assert data.parse is sources.parse and data.TokenBlocks.__name__ == "TokenBlocks"
