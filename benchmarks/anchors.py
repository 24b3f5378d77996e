"""Published figures of real GPT-2s, computed anew: ours beside theirs, for whoever has the weights.

    python -m benchmarks.anchors [--model gpt2] [--large gpt2-large] [--data wikitext] [--only p1,windows_2]

The hub, or its cache, must give what is named; local folders and files serve as well. Where the figures come from:

p1, windows_2, windows_4: the notebooks merge_v2 and merge_v3 of chetaniitbhilai/Efficient-Transformer-Compression-via-
    Merged-and-Shared-Feed-Forward-Networks. Protocol P1: the first 200 lines of WikiText-2-raw validation that are not
    blank, as they stand (blanks and line end kept), cut to 128 tokens, no BOS, four a batch padded at the right; summed
    NLL over counted tokens. windows_2: two FFNs become their aligned average, stored once, anchor the first; aligned on
    the first 4,000 tokens of the same lines cut to 64. windows_4: four FFNs become a copy of the first, biases too.
    The correlations were published for other lines, pads counted: ours may differ by some hundredths.
small: transformers issue 13761, llm.c pull request 276. large: transformers' docs/source/en/perplexity.md. Both score
    WikiText-2-raw joined by blank lines in windows of 1024, and not the first token of a window that begins where the
    one before it ended; small also by lm-evaluation-harness's rule.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import huggingface_hub
import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2LMHeadModel

from compressor import alignment, data, gpt2, models
from compressor.alignment import Alignments
from compressor.errors import UserError, unknown
from compressor.metrics.nll import Span, text_nll, token_nll
from compressor.metrics.perplexity import perplexity
from compressor.metrics.size import parameters
from compressor.models import OpenModel
from compressor.rewrites.compose import apply
from compressor.rewrites.merged_n import MergedN

LINES, LENGTH, BATCH = 200, 128, 4  # protocol P1
ALIGNED_LENGTH, ALIGNED_TOKENS = 64, 4000
CONTEXT = 1024

P1 = 46.97976365832357
PARAMETERS = 119_717_376
WINDOWS_2 = (196.45, 101.00, 86.62, 74.25, 80.09, 92.55, 60.75, 58.43, 57.56, 61.13, 66.76)
WINDOWS_4 = (3260.79, 395.99, 128.06, 102.01, 92.25, 91.09, 92.88, 98.46, 350.21)
CORRELATIONS = {  # (anchor, layer) -> mean over matched neurons
    **{(0, 1): 0.3734, (2, 3): 0.5047, (4, 5): 0.5289, (6, 7): 0.5190, (8, 9): 0.5035, (10, 11): 0.5042},
    **{(0, 2): 0.3878, (0, 3): 0.3948, (0, 4): 0.3776, (0, 5): 0.3726, (0, 6): 0.3724, (0, 7): 0.3653},
    **{(8, 10): 0.4984, (8, 11): 0.4677},
}


@dataclass(frozen=True)
class Row:
    """A figure; `digits` after the point are what was published."""

    name: str
    published: float
    ours: float
    digits: int = 2

    def markdown(self) -> str:
        published, ours = (f"{value:,.{self.digits}f}" for value in (self.published, self.ours))
        return f"| {self.name} | {published} | {ours} | {self.ours - self.published:+,.{self.digits}f} |"


class Subject:
    """A model and the text that it is scored on, each opened when it is first asked for."""

    def __init__(self, name: str, source: str, device: str | None):
        self.name, self.source, self.device = name, source, device

    @cached_property
    def opened(self) -> OpenModel:
        return models.open_model(self.name, device=self.device)

    @property
    def model(self) -> GPT2LMHeadModel:
        return self.opened.model

    @cached_property
    def validation(self) -> data.Text:
        """The whole split; all of a source without splits."""
        return data.text(self.source, "selection", alone=True)

    @cached_property
    def test(self) -> data.Text:
        """The same."""
        return data.text(self.source, "test", alone=True)

    @property
    def lines(self) -> list[str]:
        """Those of protocol P1."""
        rows = self.validation.documents
        if len(rows) == 1:  # a .txt
            rows = tuple(line + "\n" for line in rows[0].split("\n"))
        return [row for row in rows if row.strip()][:LINES]

    def rows(self, length: int) -> list[Tensor]:
        """int64[tokens] of each line, cut to `length` tokens or to what the model holds."""
        length = min(length, self.model.config.n_positions)
        encoded = self.opened.tokenizer(self.lines, add_special_tokens=False, verbose=False)["input_ids"]
        return [torch.tensor(ids[:length], dtype=torch.int64) for ids in encoded]

    def p1(self, model: GPT2LMHeadModel) -> float:
        """Perplexity of the lines under protocol P1."""
        return p1_perplexity(model, self.rows(LENGTH))


# ---------------------------------------------------------------- protocol P1


def p1_perplexity(model: GPT2LMHeadModel, rows: Sequence[Tensor]) -> float:
    """exp of the summed NLL over the predicted tokens of rows, int64[tokens] each, that are scored one by one."""
    nll, tokens = 0.0, 0
    for start in range(0, len(rows), BATCH):
        ids, mask = padded(rows[start : start + BATCH])
        device = gpt2.device(model)
        nll += float(token_nll(model, ids.to(device), mask.to(device)).sum())
        tokens += int(mask[:, 1:].sum())
    return math.exp(nll / tokens)


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """ids int64[rows, longest] and mask bool of the same shape, pads at the end."""
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def p1(subject: Subject) -> list[Row]:
    return [Row("P1: gpt2", P1, subject.p1(subject.model))]


# ---------------------------------------------------------------- windows of two: the aligned average


def aligned(subject: Subject, *, n: int, start: int) -> Alignments:
    """The alignment of the source: on its first tokens, adjacent layers and those of one window to its first."""
    rows, left = [], ALIGNED_TOKENS
    for row in subject.rows(ALIGNED_LENGTH):
        rows.append(row[:left])
        left -= len(rows[-1])
        if left == 0:
            break
    batches = [padded(rows[first : first + 32]) for first in range(0, len(rows), 32)]
    return alignment.align_activations(subject.model, batches, pairs="direct", n=n, anchor="first", start=start)


def windows_2(subject: Subject) -> list[Row]:
    model, layers = subject.model, subject.model.config.n_layer
    solved = aligned(subject, n=min(8, layers), start=0)
    result = []
    for start in tqdm(range(layers - 1), desc="windows of two", leave=False, disable=None):
        rewrite = MergedN(n=2, start=start, anchor="first", tie=True).resolved(model.config)
        merged = apply([rewrite], model, solved)
        if start == 0:
            result.append(Row("windows of two, parameters counted once", PARAMETERS, parameters(merged), digits=0))
        if start < len(WINDOWS_2):
            result.append(Row(f"windows of two: [{start}, {start + 1}]", WINDOWS_2[start], subject.p1(merged)))
    matched = {(item.anchor, item.layer): item.quality.matched for item in solved.solved}
    if layers >= 12:
        other = aligned(subject, n=4, start=8)
        matched |= {(item.anchor, item.layer): item.quality.matched for item in other.solved}
    for (anchor, layer), value in CORRELATIONS.items():
        if (anchor, layer) in matched:
            result.append(
                Row(f"mean matched correlation, {layer} to {anchor}", value, matched[anchor, layer], digits=4)
            )
    return result


# ---------------------------------------------------------------- windows of four: copies


@contextmanager
def copied(model: GPT2LMHeadModel, layers: range) -> Iterator[None]:
    """Every FFN of these layers is a copy of the first one's, biases too."""
    kept = {layer: [tensor.clone() for tensor in gpt2.ffn_weights(model, layer)] for layer in layers}
    try:
        for layer in layers:
            for tensor, value in zip(gpt2.ffn_weights(model, layer), kept[layers[0]], strict=True):
                tensor.copy_(value)
        yield
    finally:
        for layer in layers:
            for tensor, value in zip(gpt2.ffn_weights(model, layer), kept[layer], strict=True):
                tensor.copy_(value)


def windows_4(subject: Subject) -> list[Row]:
    result = []
    found = range(min(len(WINDOWS_4), subject.model.config.n_layer - 3))
    for start in tqdm(found, desc="windows of four", leave=False, disable=None):
        with copied(subject.model, range(start, start + 4)):
            result.append(
                Row(f"windows of four: [{start} to {start + 3}]", WINDOWS_4[start], subject.p1(subject.model))
            )
    return result


# ---------------------------------------------------------------- windows over the whole text


def documented_perplexity(model: GPT2LMHeadModel, ids: Tensor, context: int, stride: int) -> float:
    """As transformers' documentation has it: the mean loss of a window counts as often as it has new tokens, less one.

    ids: int64[tokens] of the text. A window scores the tokens that the one before it did not hold, but never its first.
    """
    spans, weights, held = [], [], 0
    for start in range(0, len(ids), stride):
        stop = min(start + context, len(ids))
        if stop - held > 1:
            spans.append(Span(start, stop - 1, max(held, start + 1)))
            weights.append(stop - held - 1)
        held = stop
        if stop == len(ids):
            break
    nll = text_nll(model, [ids], [spans])
    means = [float(part.mean()) for part in nll.split([span.stop - span.first + 1 for span in spans])]
    return math.exp(sum(mean * weight for mean, weight in zip(means, weights, strict=True)) / sum(weights))


def _documented(subject: Subject, text: data.Text, stride: int) -> float:
    ids = subject.opened.tokenizer.encode(text.joined, add_special_tokens=False, verbose=False)
    context = min(CONTEXT, subject.model.config.n_positions)
    return documented_perplexity(subject.model, torch.tensor(ids), context, min(stride, context))


def small(subject: Subject) -> list[Row]:
    words = perplexity(subject.model, subject.opened.tokenizer, subject.test, protocol="lm-eval")[1]
    return [
        Row("gpt2, test, windows of 1024", 29.94, _documented(subject, subject.test, CONTEXT)),
        Row("gpt2, validation, windows of 1024", 31.04, _documented(subject, subject.validation, CONTEXT)),
        Row("gpt2, test, word perplexity as lm-eval", 37.37, words.value),
    ]


def large(subject: Subject) -> list[Row]:
    return [
        Row("gpt2-large, test, stride 1024", 19.44, _documented(subject, subject.test, CONTEXT)),
        Row("gpt2-large, test, stride 512", 16.44, _documented(subject, subject.test, CONTEXT // 2)),
    ]


# ---------------------------------------------------------------- the command

SECTIONS: dict[str, Callable[[Subject], list[Row]]] = {
    "p1": p1,
    "windows_2": windows_2,
    "windows_4": windows_4,
    "small": small,
    "large": large,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """0 done, 2 where a model or the text cannot be had, in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2", help="for all but `large`")
    parser.add_argument("--large", default="gpt2-large", help="for `large`")
    parser.add_argument("--data", default="wikitext", help="with a validation and a test split, or one of all")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"default: {','.join(SECTIONS)}")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, help="also write the table here")
    options = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    try:
        document = reproduce(options.only.split(","), options.model, options.large, options.data, options.device)
    except UserError as error:
        print(f"anchors: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(document)
    if options.out:
        options.out.write_text(document, encoding="utf-8")
    return 0


@torch.no_grad()
def reproduce(sections: Sequence[str], model: str, large_model: str, source: str, device: str | None) -> str:
    """The table as Markdown. Raises UserError for an unknown section and for what cannot be had."""
    for section in sections:
        if section not in SECTIONS:
            raise unknown("section", section, SECTIONS)
    subjects = {name: Subject(name, source, device) for name in (model, large_model)}
    rows: list[Row] = []
    for section in tqdm(sections, desc="anchors", disable=None):
        subject = subjects[large_model if section == "large" else model]
        _ = subject.test if section in ("small", "large") else subject.validation  # before the weights
        rows += SECTIONS[section](subject)
    return "\n".join(
        [
            f"Ours: {model}, {large_model}, {source}; "
            f"torch {torch.__version__}, transformers {transformers.__version__}.",
            "",
            "| figure | published | ours | difference |",
            "| --- | ---: | ---: | ---: |",
            *(row.markdown() for row in rows),
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
