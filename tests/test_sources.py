"""What a D names, how files and the hub's cache are read, and that every mistake is one line."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from compressor.errors import UserError
from compressor.sources import Source, parse, splits, strings

datasets.disable_progress_bars()


def rows_of(path, split="all", column=None):
    """All of a split's text: a string for .txt, else a list."""
    source = parse(str(path))
    stored = splits(source)[split]()
    return stored if isinstance(stored, str) else strings(stored, source, column, 0, len(stored))


def one_line(error) -> str:
    message = str(error.value)
    assert message and "\n" not in message and len(message) < 700
    return message


# ---------------------------------------------------------------- names


def test_names_of_the_hub():
    assert parse("someone/reviews") == Source("", "hub", "someone/reviews", None)
    assert parse("someone/reviews:cfg-1.0") == Source("", "hub", "someone/reviews", "cfg-1.0")
    assert parse("ag_news").target == "ag_news"
    assert parse("demo").kind == "demo"


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("wikitext", "Salesforce/wikitext:wikitext-2-raw-v1"),
        ("imdb", "stanfordnlp/imdb"),
        ("cnn_dailymail", "abisee/cnn_dailymail:3.0.0"),
        ("wikitext:wikitext-103-raw-v1", "Salesforce/wikitext:wikitext-103-raw-v1"),
    ],
)
def test_short_names_equal_their_long_forms(short, long):
    assert parse(short) == parse(long)
    assert parse(short).name == short


def test_two_spellings_of_a_path_are_one_source(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("a.txt") == parse("./a.txt") == parse("~/a.txt") == parse(str(tmp_path / "a.txt"))
    assert parse("a.txt").kind == "file"


def test_what_exists_goes_before_the_hub_but_not_before_a_short_name(tmp_path, monkeypatch):
    (tmp_path / "someone" / "reviews").mkdir(parents=True)
    (tmp_path / "imdb").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse("someone/reviews").kind == "folder"
    assert parse("imdb").kind == "hub"
    assert parse("./imdb").kind == "folder"


@pytest.mark.parametrize(
    "spec",
    [
        "missing.txt",
        "missing.jsonl",
        "missing.json",
        "missing.csv",
        "MISSING.PARQUET",
        "./missing",
        "../missing",
        "~/missing",
        "/no/such/folder",
        "there/missing",
        "a/b/c",
        "missing/",
    ],
)
def test_a_missing_path_is_no_hub_name(spec, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError) as error:
        parse(spec)
    assert repr(spec) in one_line(error) and "no such file" in str(error.value)


def test_a_missing_path_names_the_nearest_file(tmp_path):
    (tmp_path / "reviews.txt").write_text("x")
    with pytest.raises(UserError, match=r"did you mean 'reviews.txt'"):
        parse(str(tmp_path / "reveiws.txt"))


@pytest.mark.parametrize("spec", ["", " ", "two words", "a:", "imdb:", "demo:x", ":x", "text", "json", "parquet"])
def test_what_can_be_no_name(spec, tmp_path, monkeypatch):
    # `text` and `json` are readers of the datasets library, which would read the current folder
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stray.txt").write_text("stray")
    with pytest.raises(UserError) as error:
        parse(spec)
    assert repr(spec) in one_line(error) and ".parquet" in str(error.value)


def test_a_file_of_another_type(tmp_path):
    (tmp_path / "notes.docx").write_bytes(b"x")
    with pytest.raises(UserError, match="another type; allowed"):
        parse(str(tmp_path / "notes.docx"))


# ---------------------------------------------------------------- files


def test_a_txt_is_unaltered(tmp_path):
    content = "\n\n first line \r\nsecond\rthird\ttab \u2028 \ufeff caf\u00e9 \x1c end \n \n"
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert rows_of(tmp_path / "a.txt") == content


ROWS = ["plain", "", " NA ", "NA", "null", "two\nlines", 'quote " and , comma', "caf\u00e9 \u4e2d"]


def test_every_table_type_gives_the_same_rows(tmp_path):
    table = datasets.Dataset.from_dict({"number": list(range(len(ROWS))), "text": ROWS})
    table.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    (tmp_path / "a.json").write_text(json.dumps(list(table)))
    table.to_csv(tmp_path / "a.csv")
    (tmp_path / "we[1]rd *.jsonl").write_text((tmp_path / "a.jsonl").read_text())
    for name in ("a.parquet", "a.jsonl", "a.json", "a.csv", "we[1]rd *.jsonl"):
        assert rows_of(tmp_path / name) == ROWS, name


def test_a_changed_file_is_read_anew(tmp_path):
    path = tmp_path / "a.jsonl"
    stamps = path.write_text('{"text": "one"}\n') and (1_000_000_000, 1_000_000_000)
    os.utime(path, ns=stamps)
    assert rows_of(path) == ["one"]
    path.write_text('{"text": "two"}\n')
    os.utime(path, ns=stamps)
    assert rows_of(path) == ["two"]


def test_the_stem_names_the_split(tmp_path):
    for stem in ("train-00000-of-00002", "train-00001-of-00002", "dev", "Test_1", "testimonials", "device"):
        (tmp_path / f"{stem}.jsonl").write_text(json.dumps({"text": stem}) + "\n")
    (tmp_path / ".hidden.jsonl").write_text("no json")
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / "folder.txt").mkdir()
    found = {split: rows_of(tmp_path, split) for split in splits(parse(str(tmp_path)))}
    assert found == {
        "train": ["train-00000-of-00002", "train-00001-of-00002"],
        "validation": ["dev"],
        "test": ["Test_1"],
        "testimonials": ["testimonials"],
        "device": ["device"],
    }


@pytest.mark.parametrize(
    ("stem", "split"),
    [
        ("valid", "validation"),
        ("val", "validation"),
        ("validation", "validation"),
        ("dev2", "validation"),
        ("training", "train"),
        ("testing", "test"),
    ],
)
def test_aliases_of_the_splits(stem, split, tmp_path):
    (tmp_path / f"{stem}.txt").write_text("x")
    assert list(splits(parse(str(tmp_path)))) == [split]


def test_files_of_other_names_are_train_where_there_is_nothing_else(tmp_path):
    for stem in ("b", "a"):
        (tmp_path / f"{stem}.txt").write_bytes(f"{stem}\r\n".encode())
    assert rows_of(tmp_path, "train") == "a\r\n\n\nb\r\n"
    assert rows_of(tmp_path, "b") == "b\r\n"


def test_reading_leaves_the_library_as_it_was_and_says_nothing(tmp_path, capfd):
    (tmp_path / "bad.jsonl").write_text('{"text": \n')
    datasets.enable_progress_bars()
    level = datasets.logging.get_verbosity()
    try:
        with pytest.raises(UserError):
            rows_of(tmp_path / "bad.jsonl")
        (tmp_path / "good.jsonl").write_text('{"text": "a"}\n')
        rows_of(tmp_path / "good.jsonl")
        assert not datasets.are_progress_bars_disabled()
        assert datasets.logging.get_verbosity() == level != logging.CRITICAL
    finally:
        datasets.disable_progress_bars()
    assert capfd.readouterr() == ("", "")


BROKEN = {
    "bad.parquet": b"PAR1 nonsense",
    "empty.parquet": b"",
    "bad.jsonl": b'{"text": "a"}\n{"text": \n',
    "empty.jsonl": b"",
    "blank.jsonl": b"\n\n",
    "scalar.json": b"3",
    "latin.jsonl": b'{"text": "caf\xe9"}\n',
    "list.json": b'{"text": ["a", "b"]}',
    "drift.jsonl": b'{"text": "a"}\n{"text": 3}\n',
    "missing.jsonl": b'{"text": "a"}\n{"text": null}\n',
    "empty.csv": b"",
    "header.csv": b"text,b\n",
    "bad.csv": b'text,b\n"a,1\n2,3,4,5\n',
    "latin.csv": b"text\ncaf\xe9\n",
    "numbers.csv": b"text\n1\n2\n",
    "latin.txt": b"caf\xe9",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line(name, tmp_path):
    (tmp_path / name).write_bytes(BROKEN[name])
    with pytest.raises(UserError) as error:
        rows_of(tmp_path / name)
    assert name in one_line(error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_an_unreadable_file_is_one_line(name, tmp_path):
    (tmp_path / name).write_text('{"text": "a"}')
    (tmp_path / name).chmod(0)
    with pytest.raises(UserError) as error:
        rows_of(tmp_path / name)
    assert name in one_line(error)


def test_a_folder_without_data_and_a_split_of_two_types(tmp_path):
    with pytest.raises(UserError, match="holds no data file"):
        splits(parse(str(tmp_path)))
    (tmp_path / "train.txt").write_text("x")
    (tmp_path / "train.jsonl").write_text('{"text": "a"}')
    with pytest.raises(UserError) as error:
        rows_of(tmp_path, "train")
    assert "one type" in one_line(error)


def test_files_of_one_split_with_other_columns(tmp_path):
    (tmp_path / "train1.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "train2.jsonl").write_text('{"other": 3}\n')
    with pytest.raises(UserError) as error:
        rows_of(tmp_path, "train")
    assert "train2.jsonl" in one_line(error)


# ---------------------------------------------------------------- columns


@pytest.mark.parametrize(
    ("columns", "wanted", "found"),
    [
        ({"summary": "s", "document": "d"}, None, "d"),
        ({"content": "c", "text": "t"}, None, "t"),
        ({"article": "a", "highlights": "h", "id": "i"}, None, "a"),
        ({"prose": "p", "label": 1}, None, "p"),
        ({"text": "t", "other": "o"}, "other", "o"),
    ],
)
def test_the_text_column(columns, wanted, found, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(columns) + "\n")
    assert rows_of(tmp_path / "a.jsonl", column=wanted) == [found]


@pytest.mark.parametrize(
    ("columns", "wanted", "said"),
    [
        ({"one": "a", "two": "b", "label": 1}, None, "one, two, label"),
        ({"label": 1}, None, "label"),
        ({"text": "t", "label": 1}, "txet", "text, label"),
        ({"text": "t", "label": 1}, "label", "text"),
        ({"text": 3, "prose": "p"}, None, "prose"),
    ],
)
def test_a_wrong_column_is_one_line_with_the_columns(columns, wanted, said, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(columns) + "\n")
    with pytest.raises(UserError) as error:
        rows_of(tmp_path / "a.jsonl", column=wanted)
    assert one_line(error).endswith(said)


def test_rows_are_sliced_before_they_are_read(tmp_path):
    source = parse("someone/reviews")
    table = datasets.Dataset.from_dict({"text": ["a", "b", None, "c"]})
    assert strings(table, source, None, 0, 2) == ["a", "b"]
    assert strings(table, source, None, 3, 4) == ["c"]
    with pytest.raises(UserError, match="row 2"):
        strings(table, source, None, 1, 4)


# ---------------------------------------------------------------- the hub


OFFLINE = """
import sys
from compressor.errors import UserError
from compressor.sources import parse, splits, strings
for spec in sys.argv[1:]:
    try:
        source = parse(spec)
        found = {name: read() for name, read in splits(source).items()}
        print({name: strings(rows, source, None, 0, 2) for name, rows in found.items()})
    except UserError as error:
        print("UserError:", str(error).replace("\\n", "<newline>"))
"""


@pytest.fixture
def hub_cache(tmp_path) -> Path:
    """A HF_HOME in which someone/reviews, configuration plain, lies as a download would have left it."""
    home = tmp_path / "home"
    prepared = home / "datasets" / "someone___reviews" / "plain" / "0.0.0" / "abc"
    files = {}
    for split in ("train", "valid"):
        files[split] = str(tmp_path / f"{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps({"text": f"{split} {i}"}) + "\n" for i in range(3)))
    builder = datasets.load_dataset_builder("json", data_files=files, cache_dir=str(tmp_path / "build"))
    builder.download_and_prepare(str(prepared))
    for table in prepared.glob("json-*.arrow"):
        table.rename(prepared / table.name.replace("json-", "reviews-"))
    info = json.loads((prepared / "dataset_info.json").read_text())
    info.update(config_name="plain", dataset_name="reviews")
    (prepared / "dataset_info.json").write_text(json.dumps(info))
    return home


def test_offline_the_cache_is_used_and_what_it_lacks_is_one_line(hub_cache):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(hub_cache)}
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE"):
        environment.pop(name, None)
    specs = ["someone/reviews", "someone/reviews:plain", "someone/reviews:other", "someone/nothing", "imdb"]
    ran = subprocess.run(
        [sys.executable, "-c", OFFLINE, *specs],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=True,
    )
    lines = ran.stdout.splitlines()
    rows = "{'train': ['train 0', 'train 1'], 'validation': ['valid 0', 'valid 1']}"
    assert lines[:2] == [rows, rows]
    for spec, line in zip(specs[2:], lines[2:], strict=True):
        assert line.startswith("UserError: ") and repr(spec) in line, line
        assert "<newline>" not in line and "could not be fetched" in line
        assert "local file" in line and "HF_HUB_OFFLINE" in line
    assert "plain" in lines[2]  # the configuration that is there


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no way"),
        datasets.exceptions.DatasetNotFoundError("gone"),
        ValueError("Unknown\nconfig"),
        RuntimeError("Dataset scripts are no longer supported"),
        FileNotFoundError("nothing"),
    ],
)
def test_what_the_hub_refuses_is_one_line(error, monkeypatch):
    def refuse(*_):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError) as raised:
        splits(parse("someone/reviews"))
    assert "someone/reviews" in one_line(raised) and str(error).split()[0] in str(raised.value)


def test_splits_of_the_hub_are_called_by_our_names(monkeypatch):
    stored = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("dev", "valid", "validation", "extra")}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(stored))
    source = parse("someone/reviews:cfg")
    found = {name: strings(read(), source, None, 0, 1) for name, read in splits(source).items()}
    assert found == {"validation": ["validation"], "dev": ["dev"], "valid": ["valid"], "extra": ["extra"]}
