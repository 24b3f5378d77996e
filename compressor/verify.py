"""Prove that a saved model is what it says: reopened in a fresh process, without this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GPT2Config

from . import artifacts, modeling
from .checkpoint import find
from .errors import UserError
from .metrics.size import parameters, stored_besides
from .models import OpenModel, probe

TOLERANCE = 1e-4  # on logits in float32: other kernels, other order of sums
REPORT = "report.json"  # what a step leaves beside the model that it makes
RECOVERY = "recovery"
BASELINE = "baseline"
SLICE = "slice"
# kind of such a report -> command
MADE_BY = {"rewrite": "rewrite", RECOVERY: "finetune", BASELINE: "benchmark --baselines", SLICE: "slice"}
SENTENCE = "The film was long, but its 3 endings were not."
_HEADER = 64 * 1024  # bytes of names and shapes a safetensors file may have beside the weights
_MODELING = Path(modeling.__file__).parent


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    passed: bool
    detail: str


def verify(opened: OpenModel, *, trust: bool = False) -> list[Check]:
    """Reopen `opened.folder` in a fresh process and compare with the model opened here and with its report.

    The fresh process runs the modeling files that travel with a compressed model. Raises UserError for files that this
    package would not have written, unless `trust`; for a model that does not open there; for a damaged report.
    """
    if not trust:
        _refuse_foreign_code(opened)
    report = made(opened.folder, opened.model.config)
    fresh = _reopen(opened.folder)
    here = probe(opened.model)
    count = parameters(opened.model)
    tokens = opened.tokenizer.encode(SENTENCE)
    checks = [
        Check(
            "opens without this package",
            not fresh["compressor_imported"],
            f"{fresh['model_class']}, model_type {fresh['model_type']}"
            + (", own modeling files" if fresh["custom_code"] else ", no custom code"),
        ),
        Check(
            "every tensor found, none left over",
            not fresh["missing"] and not fresh["unexpected"],
            f"missing {fresh['missing'][:3]}, unexpected {fresh['unexpected'][:3]}",
        ),
        _close("logits equal this process's", fresh["probe"], here),
        Check(
            "cached and uncached forward agree",
            fresh["cache_difference"] <= TOLERANCE * _size_of(here),
            f"largest difference {fresh['cache_difference']:.1e}",
        ),
        Check("greedy generation is the same with and without cache", fresh["generation_equal"], "8 tokens"),
        Check(
            "no token sees a later one",
            fresh["causality_difference"] <= TOLERANCE * _size_of(here),
            f"largest difference {fresh['causality_difference']:.1e}",
        ),
        Check(
            "parameters", fresh["parameters"] == count, f"{fresh['parameters']:,} in the fresh process, {count:,} here"
        ),
        _bytes(opened, count),
        Check(
            "a second save opens too",
            fresh["second_save_difference"] <= TOLERANCE * _size_of(here)
            and fresh["second_save_files"] == fresh["files"],
            f"largest difference {fresh['second_save_difference']:.1e}",
        ),
        Check(
            "the tokenizer gives the same tokens",
            fresh["tokens"] == tokens and fresh["text"] == opened.tokenizer.decode(tokens),
            f"{len(tokens)} of a sentence",
        ),
        Check("no pickle", not fresh["pickles"], ", ".join(fresh["pickles"]) or "safetensors only"),
    ]
    if report is not None:
        checks += [
            Check(
                "weight files are those that were made", report["weights"] == opened.hash, f"sha256 {opened.hash[:12]}"
            ),
            _close("logits equal those when it was made", fresh["probe"], report["probe"]),
            Check(
                "parameters equal those when it was made",
                report["parameters"] == fresh["parameters"],
                f"{report['parameters']:,}",
            ),
        ]
    return checks


def made(folder: Path, config: GPT2Config) -> dict[str, Any] | None:
    """The report that a step left beside a model; None where there is none.

    Raises UserError for a damaged one. A plain model may have any report.json: only one of these kinds counts.
    """
    path = Path(folder) / REPORT
    if not path.is_file():
        return None
    kind = _kind(path)
    if kind not in MADE_BY:
        if not getattr(config, "compression", None):
            return None
        kind = "rewrite"  # said to be damaged below
    remedy = f"{MADE_BY[kind]} --force"
    document = artifacts.read_json(path, kind, remedy)
    shapes = {"weights": str, "parameters": int, "parameters_before": int, "probe": dict, "provenance": dict}
    if kind == RECOVERY:
        shapes |= {"made_from": dict, "recovery": dict, "selection_perplexity": dict}
    elif kind == SLICE:
        shapes |= {"made_from": dict}
    wrong = [key for key, shape in shapes.items() if not isinstance(document.get(key), shape)]
    if not wrong and not all(_numbers(document["probe"].get(key)) for key in ("ids", "tokens", "logits", "logsumexp")):
        wrong = ["probe"]
    if wrong:
        raise UserError(f"{path} is damaged ({', '.join(wrong)}); make it anew with `gpt2-compress {remedy}`")
    return document


def _kind(path: Path) -> str | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document.get("kind") if isinstance(document, dict) else None


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, int | float) for item in value)


def _refuse_foreign_code(opened: OpenModel) -> None:
    """The fresh process runs a compressed model's own files: they must be those that this package ships."""
    if opened.plain:  # reopened without trust_remote_code, whatever lies there
        return
    given = getattr(opened.model.config, "auto_map", None)
    if given is not None and given != modeling.AUTO_MAP:
        raise UserError(f"{opened.name}: the auto_map in its config.json is not this package's; --force runs it anyway")
    for file in sorted(opened.folder.glob("*.py")):
        own = _MODELING / file.name
        if not own.is_file() or own.read_bytes() != file.read_bytes():
            raise UserError(
                f"{file} is not the file that this package ships, and verifying runs it; --force runs it anyway"
            )


def _bytes(opened: OpenModel, count: int) -> Check:
    """The weight files hold every parameter once; what foreign checkpoints hold besides is told."""
    found = find(opened.name if opened.name == "demo" else str(opened.folder))
    besides = stored_besides(opened.model)
    expected, foreign = (count + besides) * opened.stored_dtype.itemsize, found.foreign_bytes
    ours = bool(getattr(opened.model.config, "compression", None))
    once = expected <= found.bytes - foreign <= expected + _HEADER * len(found.files)
    return Check(
        "bytes",
        once and not (ours and foreign),
        f"{found.bytes:,} on disk for {count:,} parameters"
        + (f" and {besides:,} fixed numbers" if besides else "")
        + f" of {opened.stored_dtype.itemsize} bytes"
        + (f" and {foreign:,} of other tensors" if foreign else ""),
    )


def _size_of(values: dict[str, Any]) -> float:
    """What differences of logits are compared with: rounding grows with the numbers."""
    return max(1.0, *(abs(value) for value in values["logsumexp"]))


def _close(name: str, one: dict[str, Any], other: dict[str, Any]) -> Check:
    pairs = [(one[key], other[key]) for key in ("logits", "logsumexp")]
    if one["ids"] != other["ids"] or one["tokens"] != other["tokens"] or any(len(a) != len(b) for a, b in pairs):
        return Check(name, False, "not the same probe")
    difference = max(abs(a - b) for first, second in pairs for a, b in zip(first, second, strict=True))
    return Check(name, difference <= TOLERANCE * _size_of(other), f"largest difference {difference:.1e}")


def _reopen(folder: Path) -> dict[str, Any]:
    """What reopen.py says, run where `import compressor` fails."""
    script = Path(__file__).with_name("reopen.py")
    start = (
        "import runpy, sys; sys.modules['compressor'] = None; "
        f"sys.argv = [{str(script)!r}, {str(folder.resolve())!r}, {SENTENCE!r}]; "
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    with tempfile.TemporaryDirectory() as scratch:
        environment = {
            **os.environ,
            "HF_MODULES_CACHE": scratch,
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        answer = subprocess.run(
            [sys.executable, "-c", start], capture_output=True, text=True, cwd=scratch, env=environment
        )
    if answer.returncode:
        last = answer.stderr.strip().splitlines()[-1] if answer.stderr.strip() else "no message"
        raise UserError(f"{folder} does not open in a fresh process: {last}")
    return json.loads(answer.stdout.strip().splitlines()[-1])
