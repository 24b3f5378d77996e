"""The arithmetic behind the published figures, against loops written with transformers, numpy and scipy alone."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_config, make_model, make_text
from scipy.optimize import linear_sum_assignment
from transformers import GPT2Config

from compressor.metrics.size import parameters
from compressor.models import build, open_model
from compressor.rewrites.compose import structure
from compressor.rewrites.merged_n import MergedN

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "anchors.py"


@pytest.fixture(scope="module")
def anchors():
    spec = importlib.util.spec_from_file_location("anchors", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["anchors"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wiki(tmp_path_factory):
    """Rows as WikiText has them, a validation and a test split: blank ones among them, blanks and line ends kept."""
    folder = tmp_path_factory.mktemp("wiki")
    for split, seed in (("validation", 3), ("test", 4)):
        lines = make_text(260, seed).splitlines()
        rows = [" " + " ".join(lines[i : i + 1 + i % 5]) + " \n" if i % 7 else ["", " \n"][i % 2] for i in range(260)]
        rows[9] = " = \n"
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def subject(anchors, wiki, tiny_folder):
    return anchors.Subject(str(tiny_folder), str(wiki), "cpu")


def documents(wiki, split):
    return [json.loads(row)["text"] for row in (wiki / f"{split}.jsonl").read_text().splitlines()]


def batches(texts, tokenizer, length):
    """ids, labels with -100 for pads, of four lines at a time; pads are a token of the text."""
    for start in range(0, len(texts), 4):
        rows = [tokenizer.encode(text)[:length] for text in texts[start : start + 4]]
        width = max(map(len, rows))
        ids = torch.tensor([row + [5] * (width - len(row)) for row in rows])
        yield ids, torch.tensor([row + [-100] * (width - len(row)) for row in rows])


@pytest.fixture
def few(anchors, monkeypatch):
    """Fewer lines and tokens: the arithmetic is the same."""
    monkeypatch.setattr(anchors, "LINES", 40)
    monkeypatch.setattr(anchors, "ALIGNED_TOKENS", 900)


def brute_force(model, tokenizer, texts, lines=40):
    """The lines one batch after the other, by transformers' own loss with labels of -100."""
    total, tokens = 0.0, 0
    for ids, labels in batches([text for text in texts if len(text.strip()) > 0][:lines], tokenizer, 64):
        count = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += model(ids, labels=labels).loss.item() * count
        tokens += count
    return math.exp(total / tokens)


def test_p1(anchors, subject, tiny_folder, wiki):
    opened = open_model(str(tiny_folder), device="cpu")
    expected = brute_force(opened.model, opened.tokenizer, documents(wiki, "validation"), lines=200)
    (row,) = anchors.p1(subject)
    assert row.ours == pytest.approx(expected, rel=1e-5) and row.published == pytest.approx(46.98, abs=0.001)
    rows = subject.rows(128)
    assert len(rows) == 200 and max(map(len, rows)) == 64 and min(map(len, rows)) < 8
    shuffled = [rows[i] for i in torch.randperm(200, generator=torch.Generator().manual_seed(1))]
    assert anchors.p1_perplexity(opened.model, shuffled) == pytest.approx(expected, rel=1e-5)  # pads count for nothing


@pytest.mark.usefixtures("few")
def test_windows_of_two(anchors, subject, tiny_folder, wiki):
    """Correlated, assigned, averaged and tied by hand."""
    opened = open_model(str(tiny_folder), device="cpu")
    model, tokenizer = opened.model, opened.tokenizer
    texts = documents(wiki, "validation")
    features = {layer: [] for layer in range(6)}
    for text in [text for text in texts if text.strip()][:40]:
        hooks = [
            block.mlp.c_fc.register_forward_hook(lambda _, inputs, out, layer=layer: features[layer].append(out[0]))
            for layer, block in enumerate(model.transformer.h)
        ]
        with torch.no_grad():
            model(torch.tensor([tokenizer.encode(text)[:64]]))
        for hook in hooks:
            hook.remove()
    acts = {layer: torch.cat(found)[:900].double().numpy() for layer, found in features.items()}
    found = {row.name: row for row in anchors.windows_2(subject)}
    for start in (0, 3):
        cross = np.corrcoef(acts[start], acts[start + 1], rowvar=False)[:128, 128:]
        order = linear_sum_assignment(-cross)[1]
        if start == 0:
            mean = cross[np.arange(128), order].mean()
            assert found["mean matched correlation, 1 to 0"].ours == pytest.approx(mean, abs=1e-5)
        merged = open_model(str(tiny_folder), device="cpu").model
        one, two = (merged.transformer.h[layer].mlp for layer in (start, start + 1))
        with torch.no_grad():
            for first, second in (
                (one.c_fc.weight, two.c_fc.weight[:, order]),
                (one.c_fc.bias, two.c_fc.bias[order]),
                (one.c_proj.weight, two.c_proj.weight[order]),
                (one.c_proj.bias, two.c_proj.bias),
            ):
                first.add_(second).div_(2)
        merged.transformer.h[start + 1].mlp = one
        expected = brute_force(merged, tokenizer, texts)
        assert found[f"windows of two: [{start}, {start + 1}]"].ours == pytest.approx(expected, rel=1e-4)
    count = sum(parameter.numel() for parameter in merged.parameters())  # a module that stands twice counts once
    assert found["windows of two, parameters counted once"].ours == count
    assert [row.published for row in found.values() if "windows of two: " in row.name] == list(anchors.WINDOWS_2[:5])


@pytest.mark.usefixtures("few")
def test_a_model_of_gpt2s_depth_has_every_published_figure(anchors, wiki, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(anchors, "LINES", 8)
    make_model(make_config(n_layer=12)).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    subject = anchors.Subject(str(tmp_path), str(wiki), "cpu")
    rows = {row.name: row.published for row in (*anchors.windows_2(subject), *anchors.windows_4(subject))}
    assert [value for name, value in rows.items() if "windows of two: " in name] == list(anchors.WINDOWS_2)
    assert [value for name, value in rows.items() if "windows of four: " in name] == list(anchors.WINDOWS_4)
    assert rows["mean matched correlation, 7 to 0"] == 0.3653
    assert rows["mean matched correlation, 11 to 8"] == 0.4677
    assert sum("correlation" in name for name in rows) == len(anchors.CORRELATIONS) == 14
    merged = MergedN(n=2, start=0, anchor="first", tie=True).resolved(GPT2Config())
    assert parameters(build(structure([merged], GPT2Config()))) == anchors.PARAMETERS


@pytest.mark.usefixtures("few")
def test_windows_of_four(anchors, subject, tiny_folder, wiki):
    opened = open_model(str(tiny_folder), device="cpu")
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    rows = anchors.windows_4(subject)
    assert [row.published for row in rows] == [3260.79, 395.99, 128.06]
    for layer in (2, 3, 4):
        opened.model.transformer.h[layer].mlp = opened.model.transformer.h[1].mlp
    expected = brute_force(opened.model, opened.tokenizer, documents(wiki, "validation"))
    assert rows[1].ours == pytest.approx(expected, rel=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())


@pytest.mark.parametrize(("context", "stride", "length"), [(64, 64, 1000), (64, 32, 1000), (64, 64, 961), (64, 24, 50)])
def test_the_documented_windows(anchors, subject, wiki, context, stride, length):
    """transformers' documentation, line by line."""
    model, tokenizer = subject.model, subject.opened.tokenizer
    ids = torch.tensor([tokenizer.encode("\n\n".join(documents(wiki, "test")))])[:, :length]
    total, count, held = 0.0, 0, 0
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        new = end - held
        labels = ids[:, begin:end].clone()
        labels[:, :-new] = -100
        with torch.no_grad():
            loss = model(ids[:, begin:end], labels=labels).loss
        valid = int((labels != -100).sum()) - 1
        if valid:
            total, count = total + loss.item() * valid, count + valid
        held = end
        if end == length:
            break
    found = anchors.documented_perplexity(model, ids[0], context, stride)
    assert found == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.mark.usefixtures("few")
def test_the_whole_table(anchors, tiny_folder, wiki, tmp_path, capsys):
    words = ["--model", str(tiny_folder), "--large", str(tiny_folder), "--data", str(wiki), "--device", "cpu"]
    assert anchors.main([*words, "--out", str(tmp_path / "table.md")]) == 0
    said = capsys.readouterr().out
    assert said.strip() == (tmp_path / "table.md").read_text().strip()
    table = [line.split(" | ") for line in said.splitlines() if line.startswith("| ")][1:]
    names = [line[0].removeprefix("| ") for line in table]
    assert names[1] == "P1: gpt2" and table[1][1] == "46.98"
    assert names[2:8] == [
        "windows of two, parameters counted once",
        *(f"windows of two: [{i}, {i + 1}]" for i in range(5)),
    ]
    assert {"gpt2, test, windows of 1024", "gpt2-large, test, stride 1024", "gpt2-large, test, stride 512"} <= set(
        names
    )
    for line in table[1:]:
        published, ours, difference = (float(cell.strip(" |").replace(",", "")) for cell in line[1:])
        assert ours - published == pytest.approx(difference, abs=0.011)
    text = tmp_path / "lines.txt"  # the raw file of WikiText's own archive
    text.write_text("".join(row or "\n" for row in documents(wiki, "validation")))
    assert anchors.main([*words[:4], "--data", str(text), "--only", "p1"]) == 0
    assert capsys.readouterr().out.splitlines()[4] == "| " + " | ".join(table[1]).removeprefix("| ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "p1"], "anchors: nobody/nothing is no local folder and could not be had from the hub"),
        (["--only", "p2"], "anchors: unknown section 'p2'; allowed: large, p1, small, windows_2"),
        (["--data", "none.txt"], "anchors: data 'none.txt': there is no such file or folder"),
        (["--device", "abacus"], "anchors: device 'abacus' cannot be used here"),
    ],
)
def test_what_cannot_be_had_is_one_line(anchors, wiki, capsys, monkeypatch, words, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert anchors.main(["--model", "nobody/nothing", "--data", str(wiki), *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and said in captured.err
    assert len([line for line in captured.err.splitlines() if line and "it/s" not in line and "%|" not in line]) == 1
