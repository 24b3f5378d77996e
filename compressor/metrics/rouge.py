"""ROUGE of summaries that a model writes behind "TL;DR:", the GPT-2 paper's test (Radford et al., 2019, section 3.6).

Only what the model writes is scored. Scored together with its prompt, a model that writes garbage gets the score of
copying the document: that is what the row "prompt echo" shows, and "lead-3" what a news article's first sentences get.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from ..examples import Examples
from ..gpt2 import longest
from ..models import OpenModel
from ..tokens import text_ids
from .base import MetricResult, Progress, whole
from .decoding import BATCH, continuations, end_tokens

SETTINGS = frozenset({"max_examples", "new_tokens", "top_k", "prompt", "context", "sentences", "batch", "seed"})
PROMPT = "\nTL;DR:"
_DEMOS_PROMPT = "\nIn short:"  # what stands before a summary in the text that the embedded model was trained on
NEW_TOKENS = 100
SENTENCES = 3
_LEAST = 16  # tokens of the document that a model must see at least
_SHOWN, _BEGINNING = 3, 400  # documents in the details; characters of their beginning

_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)")
_NO_END = re.compile(r"(?:^|[\s(\"'“‘])(?:(?:[a-z]\.)+|(?:mr|mrs|ms|dr|prof|st|gen|sen|rep|gov|vs)\.)$", re.IGNORECASE)


def split_sentences(text: str) -> list[str]:
    """Sentences by rule: one ends with . ! or ?, closing quotes and brackets included, before a blank, and where its
    line ends; not after initials (J., U.S.) and titles (Mr.)."""
    found: list[str] = []
    for line in text.splitlines():
        begin = 0
        for end in _END.finditer(line):
            if not _NO_END.search(line[begin : end.end()]):
                found.append(line[begin : end.end()].strip())
                begin = end.end()
        found.append(line[begin:].strip())
    return [sentence for sentence in found if sentence]


def first_sentences(text: str, count: int | None) -> str:
    """The first `count` sentences, joined by blanks; the text as it is for None."""
    return text.strip() if count is None else " ".join(split_sentences(text)[:count])


@dataclass(frozen=True)
class _Task:
    """The rows that are scored, and what a model is given of each."""

    rows: Examples
    documents: list[list[int]]  # token ids, cut
    ending: list[int]  # the prompt's, which follow the document's
    new_tokens: int
    top_k: int | None
    sentences: int | None
    settings: dict[str, Any]

    @property
    def prompts(self) -> list[list[int]]:
        return [ids + self.ending for ids in self.documents]


def _task(
    data: Examples,
    subject: OpenModel,
    *,
    max_examples: int | None = None,
    new_tokens: int = NEW_TOKENS,
    top_k: int | None = None,
    prompt: str | None = None,
    context: int | None = None,
    sentences: int | None = SENTENCES,
) -> _Task:
    """Check the settings and cut every document at its end, so that it, the prompt and the new tokens fit `context`."""
    positions, vocabulary = subject.model.config.n_positions, subject.model.config.vocab_size
    if max_examples is not None:
        whole("max_examples", max_examples, 1)
    if top_k is not None:
        whole("top_k", top_k, 1)
    if sentences is not None:
        whole("sentences", sentences, 1)
    if prompt is None:
        prompt = _DEMOS_PROMPT if data.source == "demo" else PROMPT
    if not isinstance(prompt, str):
        raise UserError(f"prompt={prompt!r} is not allowed; allowed: a text, such as {PROMPT!r}")
    whole("new_tokens", new_tokens, 1)
    context = whole("context", positions if context is None else context, 1, longest(subject.model.config))
    rows = data.first(max_examples)
    if not any(_words(target) for target in rows.targets):
        raise UserError(f"no summary of {data.source} has a letter a to z or a digit; ROUGE counts no others")
    ending = text_ids(subject.tokenizer, vocabulary, prompt)
    room = context - len(ending) - new_tokens
    if room < _LEAST:
        raise UserError(
            f"new_tokens={new_tokens} and {len(ending)} tokens of prompt leave {max(0, room)} of {context} positions "
            f"to the document, which needs {_LEAST}; give fewer new_tokens"
        )
    whole_documents = [text_ids(subject.tokenizer, vocabulary, text.strip()) for text in rows.texts]
    hint = prompt.strip().rstrip(":") or "no prompt"
    settings = {
        "protocol": f"{hint}, {'greedy' if top_k is None else f'top-k {top_k}'}",
        "prompt": prompt,
        "context": context,
        "new_tokens": new_tokens,
        "sentences": sentences,
        "stemmer": True,
        "cut": float(np.mean([len(ids) > room for ids in whole_documents])),
        "source": rows.source,
        "part": rows.part,
        "split": rows.split,
        "fingerprint": rows.fingerprint,
    }
    return _Task(rows, [ids[:room] for ids in whole_documents], ending, new_tokens, top_k, sentences, settings)


def measure(
    subject: OpenModel,
    data: Examples,
    *,
    progress: Progress | None = None,
    batch: int = BATCH,
    seed: int = 0,
    **settings: Any,
) -> list[MetricResult]:
    """`rouge1`, `rouge2` and `rougeL` (F1 in 0..1, mean over documents, bootstrap interval) of a model's summaries.

    settings: max_examples, new_tokens=100, top_k, prompt, context, sentences=3.
    The model reads a document and `prompt` (default: "TL;DR:" on a line of its own, for the demo's rows "In short:"),
    at most `context` tokens (default n_positions) with the `new_tokens` that it writes greedily or, with `top_k`,
    sampled from the k likeliest (the paper: 2); the end of text ends a summary. The first `sentences` of it are scored
    (the paper: 3; None: all). A model that writes no word scores 0; the setting `empty` is their share. Raises
    UserError where the positions leave no room for a document.
    """
    whole("batch", batch, 1)
    whole("seed", seed, 0)
    task = _task(data, subject, **settings)
    written = continuations(
        subject.model,
        task.prompts,
        task.new_tokens,
        ends=end_tokens(subject.model, subject.tokenizer),
        top_k=task.top_k,
        seed=seed,
        batch=batch,
        progress=progress,
    )
    texts = [first_sentences(_text(subject, ids), task.sentences) for ids in written]
    said = {
        **task.settings,
        "seed": None if task.top_k is None else seed,
        "generated_tokens": float(np.mean([len(ids) for ids in written])),
        "ended": float(np.mean([len(ids) < task.new_tokens for ids in written])),
        "empty": float(np.mean([not _words(text) for text in texts])),
    }
    examples = [
        {"document": document.strip()[:_BEGINNING], "reference": target, "generated": text}
        for document, target, text in zip(task.rows.texts[:_SHOWN], task.rows.targets, texts, strict=False)
    ]
    return _score(texts, task.rows, said, examples)


def references(
    data: Examples,
    subject: OpenModel,
    *,
    batch: int = BATCH,
    seed: int = 0,
    **settings: Any,
) -> dict[str, list[MetricResult]]:
    """What no model is needed for, on the same rows: the document's first sentences ("lead-3"), and all that a model
    is given of the document ("prompt echo"), which is what a harness rewards that scores the prompt too."""
    task = _task(data, subject, **settings)
    count = SENTENCES if task.sentences is None else task.sentences
    leads = [first_sentences(text, count) for text in task.rows.texts]
    echoes = [_text(subject, ids) for ids in task.documents]
    return {
        f"lead-{count}": _score(leads, task.rows, task.settings, None),
        "prompt echo": _score(echoes, task.rows, task.settings, None),
    }


def _text(subject: OpenModel, ids: list[int]) -> str:
    return str(subject.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _words(text: str) -> bool:
    """Whether a text has anything that rouge_score counts."""
    return re.search("[a-z0-9]", text.lower()) is not None


def _score(texts: list[str], rows: Examples, settings: dict[str, Any], examples: Any) -> list[MetricResult]:
    from .measures import Rouge

    scores = Rouge().compute(predictions=texts, references=list(rows.targets))
    method = "95 % bootstrap interval over the documents, 1000 resamples"
    return [
        MetricResult(
            name,
            score["f1"],
            "F1",
            True,
            len(texts),
            {"low": score["low"], "high": score["high"], "method": method} if len(texts) > 1 else None,
            settings,
            examples if name == "rougeL" else None,
        )
        for name, score in scores.items()
    ]
