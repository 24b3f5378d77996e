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

from . import artifacts
from .errors import UserError
from .metrics.size import parameters, weight_bytes
from .models import OpenModel, probe

TOLERANCE = 1e-4  # on logits in float32: other kernels, other order of sums
_HEADER = 64 * 1024  # bytes of names and shapes a safetensors file may have beside the weights


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    detail: str


def verify(opened: OpenModel) -> list[Check]:
    """Reopen `opened.folder` in a fresh process and compare with the model opened here and with its report."""
    fresh = _reopen(opened.folder)
    here = probe(opened.model)
    count, size = parameters(opened.model), weight_bytes(opened.folder)
    expected = count * opened.stored_dtype.itemsize
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
            fresh["cache_difference"] <= TOLERANCE,
            f"largest difference {fresh['cache_difference']:.1e}",
        ),
        Check("greedy generation is the same with and without cache", fresh["generation_equal"], "8 tokens"),
        Check(
            "no token sees a later one",
            fresh["causality_difference"] <= 1e-5,
            f"largest difference {fresh['causality_difference']:.1e}",
        ),
        Check(
            "parameters", fresh["parameters"] == count, f"{fresh['parameters']:,} in the fresh process, {count:,} here"
        ),
        Check(
            "bytes",
            expected <= size <= expected + _HEADER,
            f"{size:,} on disk for {count:,} parameters of {opened.stored_dtype.itemsize} bytes",
        ),
        Check(
            "a second save opens too",
            fresh["second_save_difference"] <= TOLERANCE
            and (not fresh["custom_code"] or len(fresh["second_save_files"]) >= 2),
            f"largest difference {fresh['second_save_difference']:.1e}",
        ),
        Check("tokenizer round trip", fresh["tokenizer_round_trip"], "encode, decode"),
        Check("no pickle", not fresh["pickles"], ", ".join(fresh["pickles"]) or "safetensors only"),
    ]
    report = opened.folder / "report.json"
    if report.is_file():
        stored = artifacts.read_json(report, "rewrite", "rewrite")
        checks.append(_close("logits equal those when it was made", fresh["probe"], stored["probe"]))
        checks.append(
            Check(
                "parameters equal those when it was made",
                stored["parameters"] == fresh["parameters"],
                f"{stored['parameters']:,}",
            )
        )
    return checks


def _close(name: str, one: dict[str, Any], other: dict[str, Any]) -> Check:
    if one["ids"] != other["ids"] or one["tokens"] != other["tokens"]:
        return Check(name, False, "not the same probe")
    pairs = zip([*one["logits"], *one["logsumexp"]], [*other["logits"], *other["logsumexp"]], strict=True)
    difference = max(abs(a - b) for a, b in pairs)
    largest = max(1.0, max(abs(value) for value in other["logsumexp"]))
    return Check(name, difference <= TOLERANCE * largest, f"largest difference {difference:.1e}")


def _reopen(folder: Path) -> dict[str, Any]:
    """What reopen.py says, run where `import compressor` fails."""
    script = Path(__file__).with_name("reopen.py")
    start = (
        "import runpy, sys; sys.modules['compressor'] = None; "
        f"sys.argv = [{str(script)!r}, {str(folder.resolve())!r}]; runpy.run_path({str(script)!r}, run_name='__main__')"
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
