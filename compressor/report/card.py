"""The model card of a model that this package made: README.md with the hub's metadata."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers import GPT2Config

from ..benchmark import Report
from ..gpt2 import longest
from ..metrics import MetricResult
from ..modeling import GPT2CompressedConfig
from ..rewrites import REWRITES
from . import assisted, extrapolation, tables, tasks, tversky
from .figures import Gaps, family, scaled, title
from .layout import Table, code, escaped, markdown

FILE = "README.md"
_MARK = re.compile(r"\n<!-- gpt2-compress wrote this card; sha256 ([0-9a-f]{64}) -->\n\Z")
_HUB_TASKS = {"perplexity": "text-generation", "imdb": "text-classification", "rouge": "summarization"}
_HUB_METRICS = {"imdb_accuracy": "accuracy", "word_perplexity": "word_perplexity"}
_PLACES = ("--run", "--out", "--dense")  # options that a folder follows
_FILES = (".txt", ".jsonl", ".csv", ".parquet")
_STATE = {
    "rewritten": "as it is right after the rewrite, before any training",
    "recovered": "rewritten, then trained for a short while to recover",
    "control": "not rewritten: the original, trained on the budget that the recovery of a rewritten model had, to be "
    "compared with that",
    "pruned": "a baseline: the original pruned by magnitude to the parameters of a rewritten model",
    "dropped": "a baseline: the original without as many blocks as a rewritten model lacks",
    "pruned-recovered": "a baseline: the original pruned by magnitude to the parameters of a rewritten model, then "
    "trained on the budget of its recovery",
    "dropped-recovered": "a baseline: the original without as many blocks as a rewritten model lacks, then trained on "
    "the budget of its recovery",
    "slice": "a slice: one of the smaller models that are nested in another, cut out",
}


def signed(text: str) -> str:
    """A card with the mark that tells it from one that somebody has edited."""
    return f"{text}\n<!-- gpt2-compress wrote this card; sha256 {_digest(text)} -->\n"


def unedited(text: str) -> bool:
    """Whether this is a card as it was written, every letter of it."""
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def card(step: str, made: Mapping[str, Any], config: GPT2Config, measured: Report | None = None) -> str:
    """The card of a model, signed.

    step: one of _STATE. made: the report.json beside the model. measured: a benchmark whose rows are
    the original, the control where there is one, and this model as the last.
    """
    origin = made["provenance"]
    parts = [
        f"---\n{_metadata(step, made, config, measured)}\n---",
        f"# {escaped(_name(step, made))}",
        f"{escaped(_base(origin))}, {_STATE[step]}. Made with gpt2-compress {origin['version']}.",
        "## What was done",
        "\n".join(f"- {line}" for line in _done(made)),
        "## Size",
        markdown(_sizes(made)),
    ]
    found = tversky.diagnosis(made, step, "the report.json of this model")
    if found is not None:
        parts += [f"## {tversky.TITLE}", "\n".join(f"- {escaped(line)}" for line in tversky.summary(found))]
    if measured is not None:
        parts += ["## Figures", *_figures(measured)]
    parts += [
        "## How to open it",
        _opening(config),
        "## Limits",
        f"{_context(config)}, the tokenizer, and what the training data of the original left "
        "in it, its biases too, are inherited. Figures hold for the text that they were taken on. Rewriting loses some "
        "of the original's quality; whether the rest is enough has to be measured on the task at hand.",
        "## How it was made",
        code(command(origin["command"])),
        f"torch {origin['torch']}, transformers {origin['transformers']}, {origin['device']}, {origin['dtype']}, seed "
        f"{origin['seed']}; sha256 of the original's weights {origin['base_hash'][:12]}, of these "
        f"{made['weights'][:12]}.",
    ]
    return signed("\n\n".join(parts) + "\n")


# ---------------------------------------------------------------- names without places


def bare(name: str) -> str:
    """A local path as its last part; the name of something on the hub as it is."""
    local = name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith(_FILES) or os.path.exists(name)
    return PurePath(name).name or name if local else name


def command(given: str) -> str:
    """A command line that names folders and files without where they lie."""
    try:
        words = shlex.split(given)
    except ValueError:  # a quote of the user's own, from when commands were kept unquoted
        words = given.split()
    shown = []
    for before, word in zip(["", *words], words, strict=False):
        key, equals, value = word.rpartition("=")
        value = PurePath(value).name if before in _PLACES or key in _PLACES else bare(value)
        shown.append(key + equals + value)
    return shlex.join(shown)


def _base(origin: Mapping[str, Any]) -> str:
    name = origin["base_model"]
    return "The demo model of gpt2-compress" if name == "demo" else bare(name)


def _name(step: str, made: Mapping[str, Any]) -> str:
    rewrites = " + ".join(dict.fromkeys(str(item["rewrite"]) for item in made.get("rewrites", ())))
    return f"{bare(made['provenance']['base_model'])}: {rewrites or 'tuned'}" + (f", {step}" if rewrites else "")


# ---------------------------------------------------------------- metadata


def _metadata(step: str, made: Mapping[str, Any], config: GPT2Config, measured: Report | None) -> str:
    base = made["provenance"]["base_model"]
    rewrites = dict.fromkeys(str(item["rewrite"]) for item in made.get("rewrites", ()))
    own = ["custom_code"] if isinstance(config, GPT2CompressedConfig) else []
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base if base != "demo" and bare(base) == base else None,
        tags=["gpt2-compress", "gpt2", *rewrites, *own],
        model_name=_name(step, made),
        eval_results=list(_evaluations(measured.rows[-1].results)) if measured else [],
    )
    return data.to_yaml().strip()


def _evaluations(results: Sequence[MetricResult]) -> Iterator[EvalResult]:
    for item in results:
        source = item.settings.get("source")
        if family(item.metric) in _HUB_TASKS and source and math.isfinite(item.value):
            yield EvalResult(
                task_type=_HUB_TASKS[family(item.metric)],
                dataset_type=bare(source),
                dataset_name=bare(source),
                dataset_split=item.settings.get("split"),
                metric_type=_HUB_METRICS.get(item.metric, item.metric),
                metric_name=f"{title(item.metric)} ({item.settings['protocol']})",
                metric_value=round(item.value, 4),
            )


# ---------------------------------------------------------------- what was done


def _done(made: Mapping[str, Any]) -> Iterator[str]:
    for record in made.get("rewrites", ()):
        fields = ", ".join(f"{key} = {value}" for key, value in record.items() if key != "rewrite")
        yield f"{escaped(_sentence(str(record['rewrite'])))} Its fields: {escaped(fields)}."
    matched = made.get("alignment")
    if matched and matched["method"] != "none":
        text = made["provenance"]["data"].get("calibration", {})
        on = (
            f" on {matched['tokens']:,} tokens of {escaped(bare(str(text.get('source'))))}" if matched["tokens"] else ""
        )
        yield f"Neurons of neighbouring layers were matched by {matched['method']}{on}."
    if "recovery" in made:
        yield _recovery(made)


def _sentence(rewrite: str) -> str:
    """What a rewrite does, as the file that defines it says on top."""
    known = REWRITES.get(rewrite)
    lines = (sys.modules[known.__module__].__doc__ or "").strip().splitlines() if known else []
    return lines[0] if lines else f"{rewrite}."


def _recovery(made: Mapping[str, Any]) -> str:
    done, given = made["recovery"], made["made_from"]
    source = made["provenance"]["data"].get("training", {}).get("source")
    adapters = f" (rank {given['lora_rank']}, merged at the end)" if done["train"] == "lora" else ""
    teacher = ", learning also from the original's predictions" if given.get("distill") else ""
    scores = [made["selection_perplexity"][when] for when in ("before", "after")]
    before, after = ("beyond numbers" if score is None else f"{score:.2f}" for score in scores)
    return (
        f"Trained for {done['steps']:,} steps of {given['batch_tokens']:,} tokens of {escaped(bare(str(source)))}: "
        f"{done['train']}{adapters}, learning rate {given['learning_rate']:g}{teacher}. The state of step "
        f"{done['best_step']:,} was kept, the best on the selection text: perplexity {before} -> {after}."
    )


def _sizes(made: Mapping[str, Any]) -> Table:
    shown = {"layers": "{:,}", "parameters": "{:,}", "bytes": "{:,}", "flops_per_token": None, "cache_bytes": None}
    body = []
    for key, form in shown.items():
        before, after = made.get(f"{key}_before"), made.get(key)
        if after is not None:
            cells = [
                "-" if value is None else form.format(value) if form else scaled(value).strip()
                for value in (before, after)
            ]
            body.append((key.replace("_", " "), *cells, f"{after / before:.3f}" if before else "-"))
    return Table(("", "original", "this model", "ratio"), tuple(body))


# ---------------------------------------------------------------- figures


def measured_rows(report: Report, *, base: str, own: str, control: str | None) -> Report | None:
    """The rows of a report that a card shows: of these weights, under names that need no report. None where the
    original or the model itself was not measured."""
    by_weights = {row.weights: row for row in reversed(report.rows)}
    if base not in by_weights or own not in by_weights or own == base:
        return None
    wanted = [("original", base), *([("control", control)] if control in by_weights and control != own else [])]
    rows = tuple(
        dataclasses.replace(by_weights[str(weights)], name=name) for name, weights in (*wanted, ("this model", own))
    )
    return dataclasses.replace(report, rows=rows)


def _figures(measured: Report) -> Iterator[str]:
    gaps = Gaps(measured)
    yield markdown(tables.overview(measured, gaps))
    for table in tables.perplexities(measured, gaps)[:1]:
        yield escaped(f"{table.title}: {table.note[:1].lower()}{table.note[1:]}".replace(*_placeless(measured)))
    of_tasks = (tasks.table(measured, task, everything=True) for task in tasks.tasks(measured, gaps))
    for table in (*extrapolation.tables(measured, gaps), *assisted.tables(measured, gaps), *of_tasks):
        yield f"### {escaped(table.title)}"
        yield markdown(table)
    for reason in gaps.reasons:
        yield escaped(f"[{reason.number}] {reason.what} could not be measured.")  # a reason may name a place


def _placeless(measured: Report) -> tuple[str, str]:
    """The source of the text that perplexity was taken on, and the same without where it lies."""
    found = measured.rows[-1].find("perplexity")
    source = str(found.settings.get("source", "")) if found else ""
    return (source, bare(source)) if source else ("\0", "")


def _context(config: GPT2Config) -> str:
    if longest(config) is None:
        return f"The length of {config.n_positions} tokens that it was trained at, beyond which it runs"
    return f"The context of {config.n_positions} tokens"


def _opening(config: GPT2Config) -> str:
    plain = not isinstance(config, GPT2CompressedConfig)
    trust = "" if plain else ", trust_remote_code=True"
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{trust})',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
    ]
    said = (
        "It is a plain GPT-2 and opens wherever one does."
        if plain
        else "Its modeling files lie beside the weights. With the package gpt2-compress installed, `import compressor` "
        "does in place of `trust_remote_code=True`."
    )
    return "```python\n" + "\n".join(lines) + f"\n```\n\n{said}"
