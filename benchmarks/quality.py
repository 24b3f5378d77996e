"""What the scripts of quality share: their options, rows that outlive a killed run, and where the table goes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def quality_parser(
    doc: str | None, *, steps: int = 100, batch_tokens: int = 4096, test_tokens: int = 65536
) -> argparse.ArgumentParser:
    """With the options that every such script has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", default="demo", help="calibration, selection and training text")
    parser.add_argument("--test", help="default: the test part of --data")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch-tokens", type=int, default=batch_tokens)
    parser.add_argument("--test-tokens", type=int, default=test_tokens)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--state", type=Path, help="rows that are done are kept here; a killed run goes on")
    parser.add_argument("--seed", type=int, default=0)
    return parser


class Kept:
    """What was measured, by key, in a JSON file where one is given."""

    def __init__(self, file: Path | None):
        self.file = file
        self.done: dict[str, Any] = json.loads(file.read_text()) if file and file.exists() else {}

    def __call__(self, key: str, measure: Callable[[], Any]) -> Any:
        if key not in self.done:
            self.done[key] = measure()
            if self.file:
                self.file.write_text(json.dumps(self.done))
        return self.done[key]


def show(text: str, out: Path | None) -> None:
    """Print, and write."""
    print(text)
    if out:
        out.write_text(text + "\n", encoding="utf-8")
