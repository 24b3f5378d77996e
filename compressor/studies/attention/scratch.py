"""A small character-level GPT trained from scratch with each kind of attention: what they learn, and how fast.

Source: klaipher/GPTAttentionsComparison, whose Linformer and Nystroemformer saw the future, so that their losses were
no language model's, and whose Performer gave zeros. Here all are the causal attention in blocks of this package: exact
within a block, approximate before it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import GPT2Config, GPT2LMHeadModel

from ... import artifacts, fields, training_state
from ...artifacts import Provenance
from ...errors import UserError
from ...finetune import StateFolder, Step, finetune
from ...metrics.base import whole
from ...metrics.decoding import continuations
from ...metrics.size import parameters
from ...models import parse_device
from ...processes import LAUNCH, processes
from ...rewrites import Rewrite
from ...session import ANYWHERE, Columns
from ...tokens import TokenBlocks, text_ids
from ..outcome import Outcome
from . import scratch_report as told
from .character_losses import counted_nll, leak, row_nll
from .character_models import TYPES, AttentionConfig, initial, rewrites_of, variant
from .characters import UNKNOWN, CharacterText, character_text
from .scratch_speed import Times, in_turns

EVALUATIONS = 8  # of the selection text while training
SELECTION, TEST = 8192, 32768  # characters
PROMPT, SAMPLE, TOP_K = 48, 240, 40  # characters of a prompt and of what follows it, and of how many each is drawn
_KIND = "attention_scratch"


@dataclass(frozen=True)
class Trained:
    """What came of one type; losses in nats per character."""

    attention_type: str
    parameters: int
    steps: list[list[float]]  # [iteration, loss of its batch]
    evaluations: list[list[float]]  # [iteration, loss on the selection text]
    best: int  # the iteration whose weights were kept, by the selection text
    test_rows: list[float]  # the mean loss of each row of the test text
    test_count: int  # characters predicted there
    seconds: float  # of all iterations (forward, backward, optimiser), evaluations apart
    leak: float  # the largest change of a logit before a character that was changed
    sample: str
    how: dict[str, Any]  # precision, attention implementation, device, threads

    @property
    def test(self) -> float:
        return math.fsum(self.test_rows) / len(self.test_rows)


def from_scratch(
    data: str | Mapping[str, str] = "demo",
    *,
    attention_types: Sequence[str] = TYPES,
    block_size: int = 256,
    max_iters: int = 2000,
    batch_size: int = 4,
    learning_rate: float = 1e-2,
    n_layer: int = 2,
    n_head: int = 2,
    n_embd: int = 64,
    block: int = 32,
    attention_config: Mapping[str, Any] | None = None,
    prompt: str | None = None,
    seed: int = 0,
    device: str | None = None,
    columns: Columns = ANYWHERE,
    state: Path | None = None,
    progress: Callable[[str, Step], None] = lambda attention_type, step: None,
) -> Outcome:
    """Train one model of each type on the same batches from the same start, and compare them on text none has seen.

    data: as a recipe's `data:`; its training, selection and test parts are used. attention_types: of TYPES. block_size:
    characters of a row, and positions of the model. batch_size: rows of an iteration. n_layer, n_head, n_embd: of the
    model. block: characters within which attention is exact. attention_config: fields of AttentionConfig. prompt: what
    the samples continue (default: how the test text begins). state: a folder that keeps what is done, so that a killed
    comparison goes on there; types that were trained with the same settings are not trained again.

    Raises UserError for settings that are not allowed, a `state` of other settings, and several processes.
    """
    if processes().world > 1:
        raise UserError(f"the comparison from scratch runs in one process; start it without {LAUNCH}")
    config, own, kinds = checked(
        attention_types=attention_types, block_size=block_size, max_iters=max_iters, batch_size=batch_size,
        learning_rate=learning_rate, n_layer=n_layer, n_head=n_head, n_embd=n_embd, block=block,
        attention_config=attention_config, prompt=prompt, seed=seed,
    )  # fmt: skip
    text = character_text(
        data, columns=columns, block_size=block_size, training_rows=max_iters * batch_size,
        selection_rows=max(1, SELECTION // block_size), test_rows=max(1, TEST // block_size), seed=seed,
    )  # fmt: skip
    config.vocab_size = len(text.tokenizer)
    opening = text.opening[: min(PROMPT, block_size // 2)] if prompt is None else prompt
    target = parse_device(device)
    settings: dict[str, Any] = {
        "block_size": block_size, "max_iters": max_iters, "batch_size": batch_size, "learning_rate": learning_rate,
        "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block": block, "attention_config": asdict(own),
        "prompt": opening, "seed": seed, "device": target.type,
        **{part: blocks.fingerprint for part, blocks in _parts(text).items()},
    }  # fmt: skip
    start = initial(config, seed)
    made = []
    for name, rewrite in kinds.items():
        done = None if state is None else _stored(state, name, settings)
        if done is None:
            model = variant(start, config, rewrite).to(target)  # type: ignore[arg-type]
            done = _trained(name, model, text, settings, state, progress)
        made.append(done)
    times = _times(kinds, start, text, settings, state)
    described = {**settings, "vocabulary": config.vocab_size, "test_characters": made[0].test_count}
    counts = counted_nll(text.training, text.test, config.vocab_size)
    return Outcome(
        body={
            "from_scratch": {
                "settings": described,
                "data": text.origin,
                "counts": counts,
                "rows": [asdict(one) for one in made],
                "seconds": times.rounds,
            }
        },
        tables=told.tables(made, times, described, counts),
        findings=tuple(told.findings(made, times, described, counts)),
        pictures=told.pictures(made, times),
        prompts=(told.prompt(made, opening, TOP_K, seed),),
    )


def checked(
    *,
    attention_types: Sequence[str],
    block_size: int,
    max_iters: int,
    batch_size: int,
    learning_rate: float,
    n_layer: int,
    n_head: int,
    n_embd: int,
    block: int,
    attention_config: Mapping[str, Any] | None,
    prompt: str | None,
    seed: int,
) -> tuple[GPT2Config, AttentionConfig, dict[str, Rewrite | None]]:
    """Of settings as of `from_scratch`: the model but for its vocabulary, the knobs with nothing left open, and each
    type's rewrite. Raises UserError for what is not allowed."""
    for name, value in {"max_iters": max_iters, "batch_size": batch_size, "n_layer": n_layer, "n_head": n_head}.items():
        whole(name, value, 1)
    whole("block_size", block_size, 2)
    whole("seed", seed, 0)
    if not 0 < learning_rate < math.inf:
        raise UserError(f"learning_rate is {learning_rate}; allowed: above 0")
    if whole("n_embd", n_embd, 1) % n_head:
        raise UserError(f"n_embd is {n_embd}; allowed: multiples of {n_head} (n_head)")
    if not 1 <= block < block_size:
        raise UserError(f"block is {block}; allowed: 1 to {block_size - 1}: all of a block_size is exact attention")
    config = GPT2Config(
        vocab_size=1, n_positions=block_size, n_embd=n_embd, n_layer=n_layer, n_head=n_head, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    given = fields.from_record(AttentionConfig, dict(attention_config or {}), "attention_config")
    own, kinds = rewrites_of(attention_types, given, block, config, seed)
    if prompt is not None:
        _check_prompt(prompt, block_size)
    return config, own, kinds


def _parts(text: CharacterText) -> dict[str, TokenBlocks]:
    return {"training": text.training, "selection": text.selection, "test": text.test}


def _check_prompt(prompt: str, block_size: int) -> None:
    if not isinstance(prompt, str) or not 1 <= len(prompt) < block_size:
        raise UserError(f"prompt is {prompt!r}; allowed: a text of 1 to {block_size - 1} characters")


# ---------------------------------------------------------------- one type


def _trained(
    name: str,
    model: GPT2LMHeadModel,
    text: CharacterText,
    settings: Mapping[str, Any],
    state: Path | None,
    progress: Callable[[str, Step], None],
) -> Trained:
    every = max(1, settings["max_iters"] // EVALUATIONS)
    origin = _origin(name, text, settings)
    folder = None if state is None else StateFolder(Path(state) / f"{name}_training", origin)
    recovery = finetune(
        model,
        text.training,
        text.selection,
        train="full",
        steps=settings["max_iters"],
        batch_tokens=settings["batch_size"] * settings["block_size"],
        learning_rate=settings["learning_rate"],
        seed=settings["seed"],
        evaluate_every=every,
        checkpoint_every=None if folder is None else every,
        state_folder=folder,
        resume=folder is not None,
        progress=lambda step: progress(name, step),
    )
    nll = row_nll(model, text.test)
    done = Trained(
        attention_type=name,
        parameters=parameters(model),
        steps=[[step.step, step.nll] for step in recovery.curve],
        evaluations=[[one.step, one.nll] for one in recovery.evaluations],
        best=recovery.best_step,
        test_rows=nll.mean(1).tolist(),
        test_count=nll.numel(),
        seconds=recovery.training_seconds,
        leak=leak(model, text.test.ids[:1]),
        sample=_sample(model, text, settings),
        how={key: recovery.settings[key] for key in ("autocast", "attention", "device", "threads")},
    )
    if state is not None and folder is not None:
        artifacts.write_json(_file(state, name), _KIND, {"settings": dict(settings), "trained": asdict(done)}, origin)
        training_state.remove(folder)
    return done


def _sample(model: GPT2LMHeadModel, text: CharacterText, settings: Mapping[str, Any]) -> str:
    ids = text_ids(text.tokenizer, model.config.vocab_size, settings["prompt"])
    new = min(SAMPLE, settings["block_size"] - len(ids))
    forbidden = text_ids(text.tokenizer, model.config.vocab_size, UNKNOWN)
    (written,) = continuations(model, [ids], new, forbidden=forbidden, top_k=TOP_K, seed=settings["seed"])
    return str(text.tokenizer.decode(written, clean_up_tokenization_spaces=False))


# ---------------------------------------------------------------- what is kept


def _origin(name: str, text: CharacterText, settings: Mapping[str, Any]) -> Provenance:
    digest = hashlib.sha256(json.dumps({**settings, "attention_type": name}, sort_keys=True).encode()).hexdigest()
    return artifacts.provenance(
        seed=settings["seed"], base_model=f"{name}, from scratch", base_hash=digest, device=settings["device"],
        dtype="float32", data=text.origin,
    )  # fmt: skip


def _file(state: Path, name: str) -> Path:
    return Path(state) / f"{name}.json"


def _times(
    kinds: Mapping[str, Rewrite | None],
    start: GPT2LMHeadModel,
    text: CharacterText,
    settings: Mapping[str, Any],
    state: Path | None,
) -> Times:
    """Of the types side by side: measured, or as kept where they were the same types."""
    if state is not None and (file := _file(state, "seconds")).is_file():
        found = artifacts.read_json(file, f"{_KIND}_seconds", "study attention")
        if found["settings"] == settings and list(found["rounds"]) == list(kinds):
            return Times(found["rounds"])
    models = {name: variant(start, start.config, rewrite).to(settings["device"]) for name, rewrite in kinds.items()}
    times = in_turns(models, text.training, batch_tokens=settings["batch_size"] * settings["block_size"])
    if state is not None:
        body = {"settings": dict(settings), "rounds": times.rounds}
        artifacts.write_json(file, f"{_KIND}_seconds", body, _origin("all types", text, settings))
    return times


def _stored(state: Path, name: str, settings: Mapping[str, Any]) -> Trained | None:
    file = _file(state, name)
    if not file.is_file():
        return None
    found = artifacts.read_json(file, _KIND, "study attention")
    for key, value in settings.items():
        if found["settings"].get(key) != value:
            raise UserError(
                f"{file} was trained with {key}={found['settings'].get(key)!r}, now it is {value!r}; give the same, or "
                "another folder"
            )
    return Trained(**found["trained"])
