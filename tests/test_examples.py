"""The rows of tasks: which columns, which part, in which order, and that no part knows another's texts."""

from __future__ import annotations

import csv
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset

from compressor.errors import UserError
from compressor.examples import PAIRS, Examples, labelled, summaries


def reviews(start: int, stop: int, classes=(0, 1)) -> list[dict]:
    """One row a number, the classes in turn; sorted by class, as the hub's imdb is."""
    rows = [{"text": f"Review number {index}.", "label": classes[index % len(classes)]} for index in range(start, stop)]
    return sorted(rows, key=lambda row: str(row["label"]))


def write(folder: Path, **splits: list[dict]) -> str:
    folder.mkdir(exist_ok=True)
    for name, rows in splits.items():
        content = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(content, encoding="utf-8")
    return str(folder)


def pairs(part: Examples) -> set[tuple[str, str]]:
    return {(text, part.classes[target]) for text, target in zip(part.texts, part.targets, strict=True)}


# ---------------------------------------------------------------- parts


def test_labels_of_a_table_with_holes(tmp_path):
    """A CSV's empty label is none; numbers that pandas made floats of are numbers."""
    texts = [f"text {i}" for i in range(60)]
    (tmp_path / "a.csv").write_text(
        "text,label\n" + "".join(f"{text},{'' if i == 7 else i % 2}\n" for i, text in enumerate(texts))
    )
    found = labelled(str(tmp_path / "a.csv"))
    assert found.test.classes == ("0", "1")
    assert sum(map(len, (found.training, found.selection, found.test))) == 59
    floats = [float("nan") if i == 7 else float(i % 2) for i in range(60)]
    Dataset.from_dict({"text": texts, "label": floats}).to_parquet(tmp_path / "b.parquet")
    again = labelled(str(tmp_path / "b.parquet"))
    assert again.training.targets == found.training.targets and again.test.texts == found.test.texts


def test_the_test_split_is_the_test_part_and_a_tenth_of_training_selects(tmp_path):
    found = labelled(write(tmp_path / "d", train=reviews(0, 200), test=reviews(200, 260)))
    assert [(part.part, part.split, len(part)) for part in (found.training, found.selection, found.test)] == [
        ("training", "train", 180),
        ("selection", "train", 20),
        ("test", "test", 60),
    ]
    assert pairs(found.test) == {(row["text"], str(row["label"])) for row in reviews(200, 260)}
    assert pairs(found.training) | pairs(found.selection) == {
        (row["text"], str(row["label"])) for row in reviews(0, 200)
    }
    assert found.source == found.test.source == str(tmp_path / "d") and found.test.classes == ("0", "1")


@pytest.mark.parametrize(
    ("splits", "training", "selection", "test"),
    [
        (("train", "validation", "test"), "train", "validation", "test"),
        (("train", "validation"), "train", "train", "validation"),
        (("validation", "test"), "validation", "validation", "test"),
        (("train",), "train", "train", "train"),
        (("whatever",), "whatever", "whatever", "whatever"),
    ],
)
def test_which_split_is_which_part(tmp_path, splits, training, selection, test):
    rows = {name: reviews(100 * place, 100 * place + 100) for place, name in enumerate(splits)}
    found = labelled(write(tmp_path / "d", **rows))
    parts = (found.training, found.selection, found.test)
    assert [part.split for part in parts] in ([training, selection, test], ["train"] * 3)
    assert sum(map(len, parts)) == 100 * len(splits) and all(len(part) >= 9 for part in parts)
    texts = [set(part.texts) for part in parts]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]


def test_a_named_split_is_the_whole_source(tmp_path):
    found = labelled(write(tmp_path / "d", train=reviews(0, 100), test=reviews(100, 200)), split="test")
    assert sum(map(len, (found.training, found.selection, found.test))) == 100
    assert all(part.split == "test" for part in (found.training, found.selection, found.test))


def test_unlabelled_splits_stay_aside(tmp_path):
    source = write(
        tmp_path / "d", train=reviews(0, 100), test=reviews(100, 200), unsupervised=[{"text": "x", "label": -1}]
    )
    assert sum(map(len, (labelled(source).training, labelled(source).selection, labelled(source).test))) == 200


def test_training_text_inside_the_test_part_is_left_out_of_training(tmp_path):
    shared = reviews(180, 200)
    found = labelled(write(tmp_path / "d", train=reviews(0, 200), test=[*shared, *reviews(200, 260)]))
    assert len(found.test) == 80 and {row["text"] for row in shared} <= set(found.test.texts)
    assert not set(found.test.texts) & {*found.training.texts, *found.selection.texts}
    assert len(found.training) + len(found.selection) == 180


def test_training_text_inside_the_selection_part_is_left_out_of_training(tmp_path):
    found = labelled(write(tmp_path / "d", train=reviews(0, 100), validation=reviews(80, 120), test=reviews(110, 160)))
    assert not set(found.selection.texts) & {*found.training.texts, *found.test.texts}
    assert (len(found.training), len(found.selection), len(found.test)) == (80, 30, 50)


def test_copies_of_a_text_do_not_straddle_the_cut_of_one_split(tmp_path):
    copied = [row for row in reviews(0, 60) for _ in range(7)]
    found = labelled(write(tmp_path / "d", train=copied))
    texts = [set(part.texts) for part in (found.training, found.selection, found.test)]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 60


# ---------------------------------------------------------------- order


def test_a_source_sorted_by_label_gives_mixed_rows_at_every_length(tmp_path):
    rows = [{"text": f"Row {index}", "label": "rare" if index < 40 else "common"} for index in range(400)]
    part = labelled(write(tmp_path / "d", train=rows, test=reviews(0, 10, ("rare", "common")))).training
    for count in range(1, len(part) + 1):
        own = Counter(part.first(count).targets)[part.classes.index("rare")]
        assert abs(own - count / 10) <= 1, "a tenth of any first rows"


def test_the_order_of_the_source_changes_nothing(tmp_path):
    rows = {"train": reviews(0, 200), "test": reviews(200, 260)}
    first = labelled(write(tmp_path / "sorted", **rows))
    for own in rows.values():
        random.Random(3).shuffle(own)
    second = labelled(write(tmp_path / "shuffled", **rows))
    assert first.fingerprint == second.fingerprint and first.test.texts == second.test.texts
    assert first.training.texts != tuple(sorted(first.training.texts))


def test_the_first_rows_have_a_fingerprint_of_their_own(tmp_path):
    part = labelled(write(tmp_path / "d", train=reviews(0, 100), test=reviews(100, 160))).test
    few = part.first(10)
    assert few.texts == part.texts[:10] and few.targets == part.targets[:10] and len(few) == 10
    assert few.fingerprint not in (part.fingerprint, part.first(11).fingerprint)
    assert part.first(None) is part and part.first(60) is part and part.first(1000) is part


def test_another_label_is_another_fingerprint(tmp_path):
    rows = reviews(0, 100)
    first = labelled(write(tmp_path / "one", train=rows))
    rows[0]["label"] = 1
    assert labelled(write(tmp_path / "two", train=rows)).fingerprint != first.fingerprint


# ---------------------------------------------------------------- columns and classes


@pytest.mark.parametrize("label", ["label", "sentiment", "class", "target"])
@pytest.mark.parametrize("text", ["text", "content", "sentence"])
def test_columns_are_found_by_name(tmp_path, text, label):
    rows = [{text: row["text"], label: row["label"], "id": 7} for row in reviews(0, 100)]
    assert labelled(write(tmp_path / "d", train=rows)).test.texts[0].startswith("Review number")


def test_a_named_text_column_goes_first(tmp_path):
    rows = [{**row, "body": f"Body of {row['text']}"} for row in reviews(0, 100)]
    found = labelled(write(tmp_path / "d", train=rows), text_column="body")
    assert all(text.startswith("Body of") for text in found.training.texts)


def test_files_of_any_kind(tmp_path):
    rows = reviews(0, 100, ("bad", "good"))
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    first, second = (labelled(str(tmp_path / name)) for name in ("rows.parquet", "rows.csv"))
    assert first.fingerprint == second.fingerprint and first.test.classes == ("bad", "good")


def test_classes_are_counted_in_the_order_of_their_labels(tmp_path):
    found = labelled(write(tmp_path / "d", train=reviews(0, 600, tuple(range(12)))))
    assert found.test.classes == tuple(map(str, range(12)))
    for text, target in zip(found.training.texts, found.training.targets, strict=True):
        assert target == int(text.split()[-1].rstrip(".")) % 12


def test_rows_without_a_label_or_a_text_are_left_out(tmp_path):
    rows = [
        *reviews(0, 100),
        {"text": "No label", "label": None},
        {"text": " \n", "label": 1},
        {"text": None, "label": 0},
    ]
    found = labelled(write(tmp_path / "d", train=rows))
    assert sum(map(len, (found.training, found.selection, found.test))) == 100


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (reviews(0, 50, (1,)), r"has the class 1 only; allowed: two classes or more"),
        (reviews(0, 4), r"the selection part of .* has 0 rows and not every class; give more rows"),
        ([*reviews(0, 100), {"text": "One alone", "label": 2}], r"not every class; give more rows"),
        ([{"text": "x"}] * 50, r"has no column for the label \(looked for label, sentiment, class, target\)"),
        ([{"label": 1}] * 50, r"has no column for the text .*; its columns: label"),
        (reviews(0, 50, (0.5, 1.5)), r"column 'label' .* holds no classes; allowed: words or numbers from 0"),
        (reviews(0, 50, (-1, 1)), r"column 'label' .* holds no classes"),
        ([{"text": f"x {i}", "label": [i % 2]} for i in range(50)], r"column 'label' .* holds no classes"),
        ([{"text": "", "label": 1}] * 50, r"has no row with a text and a label"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, rows, said):
    with pytest.raises(UserError, match=said) as refused:
        labelled(write(tmp_path / "d", train=rows))
    assert "\n" not in str(refused.value)


def test_plain_text_has_no_rows(tmp_path):
    (tmp_path / "a.txt").write_text("Some text.")
    for read in (labelled, summaries):
        with pytest.raises(UserError, match="is plain text; a task needs rows with columns"):
            read(str(tmp_path / "a.txt"))


# ---------------------------------------------------------------- summaries


@pytest.mark.parametrize(("document", "summary"), PAIRS)
def test_pairs_of_columns_are_found(tmp_path, document, summary):
    rows = [{document: f"Long {index}", summary: f"Short {index}", "id": index} for index in range(20)]
    found = summaries(write(tmp_path / "d", test=rows, train=rows[:3]))
    assert (found.part, found.split, len(found)) == ("test", "test", 20)
    for text, target in zip(found.texts, found.targets, strict=True):
        assert target == text.replace("Long", "Short")


def test_without_a_test_split_all_of_it_is_taken(tmp_path):
    rows = [{"document": f"Long {index}", "summary": f"Short {index}"} for index in range(30)]
    found = summaries(write(tmp_path / "d", train=rows[:20], validation=rows[20:]))
    assert found.split == "train+validation" and len(found) == 30 and len(found.origins) == 2
    alone = summaries(write(tmp_path / "e", train=rows, **{"one+two": rows[:7]}), split="one+two")
    assert alone.split == "one+two" and (len(alone), len(alone.origins)) == (7, 1)


def test_pairs_in_any_order_and_without_blanks(tmp_path):
    rows = [{"article": f"Long {index}", "highlights": f"Short {index}"} for index in range(30)]
    first = summaries(write(tmp_path / "one", test=rows))
    second = summaries(write(tmp_path / "two", test=[{"article": " ", "highlights": "x"}, *rows[::-1]]))
    assert first.fingerprint == second.fingerprint and first.texts == second.texts != tuple(sorted(first.texts))


def test_a_named_column_of_documents(tmp_path):
    rows = [{"body": f"Long {index}", "document": "no", "summary": f"Short {index}"} for index in range(5)]
    assert "no" not in summaries(write(tmp_path / "d", test=rows), text_column="body").texts
    with pytest.raises(UserError, match=r"has no columns of documents and summaries \(x/summary, x/highlights\)"):
        summaries(write(tmp_path / "d", test=rows), text_column="x")


def test_pairs_without_text_are_refused(tmp_path):
    with pytest.raises(UserError, match="has no row with a document and its summary"):
        summaries(write(tmp_path / "d", test=[{"document": "a", "summary": ""}]))


# ---------------------------------------------------------------- the demo


def test_the_demo_has_both():
    found = labelled("demo")
    assert (len(found.training), len(found.selection), len(found.test)) == (2000, 500, 500)
    for part in (found.training, found.selection, found.test):
        assert set(part.targets) == {0, 1} and part.classes == ("0", "1")
    assert len(summaries("demo")) == 200
