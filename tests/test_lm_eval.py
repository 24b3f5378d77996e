"""lm-evaluation-harness opens what this package writes, and agrees with protocol lm-eval. Needs the extra `lm-eval`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from compressor.data import text
from compressor.metrics.perplexity import perplexity
from compressor.models import open_model

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'gpt2-compress[lm-eval]')")

TASK = """
task: story
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
  - {{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
"""


@pytest.mark.parametrize("model", ["plain", "compressed"])
def test_word_perplexity_is_that_of_lm_eval(model, tiny_folder, made_run, text_file, tmp_path):
    folder = {"plain": tiny_folder, "compressed": made_run / "rewritten"}[model]
    lines = text_file.read_text().splitlines()
    documents = [" ".join(lines[i : i + 9]) for i in range(0, 54, 9)]  # longer than the 64 positions, and of one window
    documents.append(lines[60])
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "story.yaml").write_text(TASK.format(rows=rows))
    subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "3",
         "--model_args", f"pretrained={folder},dtype=float32,trust_remote_code=True",
         "--tasks", "story", "--include_path", "tasks", "--output_path", "out"],
        check=True, cwd=tmp_path, capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
    )  # fmt: skip
    (said,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(said.read_text())["results"]["story"]
    opened = open_model(str(folder))
    ours = {
        r.metric: r.value
        for r in perplexity(opened.model, opened.tokenizer, text(str(rows), "all"), protocol="lm-eval")
    }
    assert ours["word_perplexity"] == pytest.approx(theirs["word_perplexity,none"], rel=1e-4)
