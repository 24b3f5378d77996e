"""The embedded default: a small pretrained GPT-2 and a generator of the language that it was trained on.

from compressor.demo import CHECKPOINT, rows
model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
texts = [row["text"] for row in rows("lm", "test")]
"""

from __future__ import annotations

from pathlib import Path

from compressor.demo.language import KINDS, SPLITS, rows, stream

CHECKPOINT = Path(__file__).parent / "checkpoint"

__all__ = ["CHECKPOINT", "KINDS", "SPLITS", "rows", "stream"]
