"""Tiny GPT-2 checkpoints and a text, made once a session; whoever changes a model or a folder gets a copy."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from toy import toy_alignment, toy_gpt2
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

END = "<|endoftext|>"
NESTED = {"rewrite": "matryoshka", "ffn": [0.5, 0.25], "width": [16], "depth": [4], "head": [16]}
_WORDS = (
    "the a one this that film story actor scene ending music camera river house winter summer dog garden letter friend "
    "was is seemed felt looked became slow quick warm dark long short quiet clever careless and but because while with "
    "without near after before never often almost loved hated forgot remembered watched wrote opened carried followed"
)


def make_text(sentences: int, seed: int = 0) -> str:
    """English-looking sentences, one a line; the same ones for the same seed."""
    chooser = random.Random(seed)
    lines = []
    for _ in range(sentences):
        words = " ".join(chooser.choices(_WORDS.split(), k=chooser.randint(5, 14)))
        lines.append(words.capitalize() + chooser.choice((".", "!", f", {chooser.randint(1, 99)}.")))
    return "\n".join(lines) + "\n"


def make_config(**changes) -> GPT2Config:
    """6 layers, d 32, 4 heads, 64 positions, 320 tokens, no dropout, unless `changes` say otherwise."""
    fields = {
        "vocab_size": 320,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 6,
        "n_head": 4,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPT2Config(**{**fields, **changes})


def make_model(config: GPT2Config, seed: int = 0) -> GPT2LMHeadModel:
    """Random weights in which everything matters: biases and LayerNorms too are away from 0 and 1."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            elif ".ln_" in name:
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, 0.12)
    return model.eval()


@pytest.fixture
def tiny_config() -> GPT2Config:
    return make_config()


@pytest.fixture(scope="session")
def _tiny_model() -> GPT2LMHeadModel:
    return make_model(make_config())


@pytest.fixture
def tiny_model(_tiny_model) -> GPT2LMHeadModel:
    """A model of its own for every test."""
    return copy.deepcopy(_tiny_model)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """A .txt of some 22,000 tokens of `tiny_tokenizer`."""
    file = tmp_path_factory.mktemp("text") / "story.txt"
    file.write_text(make_text(700), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def tiny_tokenizer(text_file) -> GPT2Tokenizer:
    """Byte-level BPE of at most 320 tokens; token 0 is the end of text."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(text_file.read_text(encoding="utf-8").splitlines(), trainer)
    parts = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in parts["merges"]]
    return GPT2Tokenizer(vocab=parts["vocab"], merges=merges, bos_token=END, eos_token=END, unk_token=END)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, _tiny_model, tiny_tokenizer) -> Path:
    """A save_pretrained folder with its tokenizer. Read only: copy it to change it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    _tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def _made_run(tmp_path_factory, tiny_folder, text_file) -> Path:
    from compressor import pipeline
    from compressor.recipe import Align
    from compressor.rewrites import from_record

    run = tmp_path_factory.mktemp("runs") / "made"
    session = pipeline.Session(device="cpu", quiet=True)
    pipeline.align(run, str(tiny_folder), str(text_file), Align(max_tokens=1000), session)
    pipeline.rewrite(run, [from_record({"rewrite": "soft_shared", "n": 3, "start": 1, "rank": 4})], session)
    return run


@pytest.fixture
def made_run(_made_run, tmp_path) -> Path:
    """A run folder of its own with an alignment of `tiny_folder` on `text_file` and rewritten/: soft_shared, layers 1
    to 3, rank 4."""
    return shutil.copytree(_made_run, tmp_path / "made")


@pytest.fixture
def aligned_run(_made_run, tmp_path) -> Path:
    """The same before the rewrite."""
    return shutil.copytree(_made_run, tmp_path / "aligned", ignore=shutil.ignore_patterns("rewritten"))


@pytest.fixture(scope="session")
def _nested_run(tmp_path_factory, _made_run) -> Path:
    from compressor import pipeline
    from compressor.rewrites import from_record

    run = shutil.copytree(_made_run, tmp_path_factory.mktemp("n") / "run", ignore=shutil.ignore_patterns("rewritten"))
    pipeline.rewrite(run, [from_record(NESTED)], pipeline.Session(device="cpu", quiet=True))
    return run


@pytest.fixture(scope="session")
def _recovered_run(tmp_path_factory, _nested_run) -> Path:
    from compressor import pipeline
    from compressor.recipe import Finetune

    run = shutil.copytree(_nested_run, tmp_path_factory.mktemp("r") / "run")
    settings = Finetune(
        steps=2, batch_tokens=128, context=32, selection_tokens=128, train="lora", control=False, checkpoint_every=9
    )
    pipeline.finetune(run, settings, pipeline.Session(device="cpu", quiet=True))
    return run


@pytest.fixture
def nested_run(_nested_run, tmp_path) -> Path:
    """A run folder of its own whose rewritten/ is NESTED."""
    return shutil.copytree(_nested_run, tmp_path / "nested")


@pytest.fixture
def recovered_run(_recovered_run, tmp_path) -> Path:
    """The same with recovered/."""
    return shutil.copytree(_recovered_run, tmp_path / "recovered")


@pytest.fixture(scope="module")
def original() -> GPT2LMHeadModel:
    """A toy model to rewrite."""
    return toy_gpt2()


@pytest.fixture(scope="module")
def alignment(original):
    return toy_alignment(original)


# ---------------------------------------------------------------- command lines


class Said:
    """What a command answered."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> dict:
        def no_constant(name):
            raise ValueError(f"{name} is no JSON")

        return json.loads(self.out, parse_constant=no_constant)


@pytest.fixture
def run(capfd):
    """A function that runs a command line in this process. capfd: what libraries write past Python counts too."""

    def run(*words: object) -> Said:
        capfd.readouterr()
        from compressor.cli import main

        code = main([str(word) for word in words])
        return Said(code, *capfd.readouterr())

    return run


@pytest.fixture
def refused(run, tmp_path):
    """A function: a command line is the user's mistake, and left everything under tmp_path as it was."""

    def refused(*words: object) -> str:
        before = tree(tmp_path)
        said = run(*words)
        assert said.code == 2 and said.out == "", said.out + said.err
        assert said.err.count("\n") == 1 and said.err.endswith("\n") and said.err.startswith("gpt2-compress: "), (
            said.err
        )
        assert tree(tmp_path) == before
        return said.err

    return refused


def tree(folder) -> dict:
    """Every path below a folder, hidden ones too, files with their bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@contextmanager
def largest_file(size):
    """Every write that would make a file larger fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ---------------------------------------------------------------- sessions


@pytest.fixture
def notices():
    return []


@pytest.fixture
def session(notices):
    from compressor.session import Session

    return Session(device="cpu", quiet=True, notice=notices.append)


def forced(session):
    return dataclasses.replace(session, force=True)


@pytest.fixture
def interrupted_after(monkeypatch):
    """A function: a command is interrupted right after so many calls of a module's function."""

    def interrupted_after(module, name, after, command):
        real, count = getattr(module, name), 0

        def counted(*arguments):
            nonlocal count
            real(*arguments)
            count += 1
            if count == after:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(module, name, counted)
            with pytest.raises(KeyboardInterrupt):
                command()

    return interrupted_after
