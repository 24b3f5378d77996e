"""The window search against one full evaluation a candidate: the same scores, in how much time.

    python -m benchmarks.search_speed [--repeats 3] [--out benchmarks/results/search_speed.md]
    python -m benchmarks.search_speed --model MODEL --calibration D --selection D --context 256 --race

The task: score every window of n = 4 right after the rewrite, on the selection text. Straightforward: for
each window fit the rewrite, then run the whole model on the whole text. Ours: hidden states go through the model once,
a candidate runs its own blocks and those above, statistics of the calibration text are shared by the fits. Race: ours,
and what is clearly behind on the blocks so far is dropped. Without --model: random weights of GPT-2 small's shape and
random tokens, where all windows are alike and a race has nothing to drop. All in one process, interleaved.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

from compressor import alignment, data, models, search
from compressor.metrics.nll import token_nll
from compressor.metrics.size import parameters
from compressor.rewrites import Rewrite, from_record
from compressor.rewrites.compose import apply
from compressor.tokens import TokenBlocks
from compressor.windows import Race, SearchResult

SPEED_BAR, RACE_BAR, AGREEMENT = 1.15, 3.0, 1e-6
Task = tuple[Rewrite, GPT2LMHeadModel, alignment.Alignments, TokenBlocks, TokenBlocks]


def random_task(rewrite: Rewrite, config: GPT2Config, context: int, tokens: int) -> Task:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()

    def blocks(part: str, seed: int) -> TokenBlocks:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, config.vocab_size, (max(2, tokens // context), context), generator=generator)
        return TokenBlocks(ids, torch.ones_like(ids, dtype=torch.bool), "random", part, "")

    return rewrite, model, alignment.identity(config), blocks("calibration", 1), blocks("selection", 2)


def real_task(rewrite: Rewrite, name: str, sources: dict[str, str], context: int, tokens: int, selected: int) -> Task:
    opened = models.open_model(name, device="cpu")
    specs = {**sources, "training": sources["selection"], "test": sources["selection"]}

    def blocks(part: str, width: int, tokens: int) -> TokenBlocks:
        return data.token_blocks(data.recipe_text(specs, part), opened.tokenizer, context=width, max_tokens=tokens,
                                 seed=0, evenly=True)  # fmt: skip

    calibration = blocks("calibration", opened.model.config.n_positions, tokens)
    alignments = alignment.align_activations(opened.model, calibration.batches())
    return rewrite, opened.model, alignments, calibration, blocks("selection", context, selected)


# ---------------------------------------------------------------- the ways


@contextmanager
def timed(stages: dict[str, float], stage: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    stages[stage] = stages.get(stage, 0.0) + time.perf_counter() - begin


def straightforward(task: Task) -> tuple[dict[str, float], list[float]]:
    """Seconds by stage, and nats per token of each window."""
    rewrite, original, alignments, calibration, selection = task
    stages: dict[str, float] = {}
    scores = []
    for window in search.allowed_windows(rewrite, original.config):
        with timed(stages, "fits"):
            made = [search.placed(rewrite, window)]
            model = apply(made, original, alignments, calibration=calibration)
        with timed(stages, "scores"):
            nll = sum(float(token_nll(model, ids, mask).sum()) for ids, mask in selection.batches())
        scores.append(nll / int(selection.mask[:, 1:].sum()))
    return stages, scores


def ours(task: Task, race: Race | None = None) -> tuple[dict[str, float], SearchResult]:
    """Seconds by stage, and the table."""
    rewrite, original, alignments, calibration, selection = task
    stages: dict[str, float] = {"fits": 0.0}

    def timed_apply(*given, **settings):
        with timed(stages, "fits"):
            return apply(*given, **settings)

    begin = time.perf_counter()
    with mock.patch.object(search, "apply", timed_apply):
        found = search.search_windows(rewrite, original, alignments, selection, calibration=calibration, race=race)
    stages["scores"] = time.perf_counter() - begin - stages["fits"]
    return stages, found


def new_parameters(task: Task) -> int:
    """The most that a candidate's model holds beyond what it shares with the original."""
    rewrite, original, alignments, calibration, selection = task
    scorer = search.PlanScorer(rewrite, original, alignments, selection, calibration=calibration)
    window = search.allowed_windows(rewrite, original.config)[-1]
    theirs = {tensor.untyped_storage().data_ptr() for tensor in original.state_dict().values()}
    state = scorer.model((window,)).state_dict().values()
    own = {tensor.untyped_storage().data_ptr(): tensor.numel() for tensor in state}
    return sum(count for pointer, count in own.items() if pointer not in theirs)


# ---------------------------------------------------------------- report


def compare(task: Task, repeats: int, race: bool) -> Iterator[str]:
    ways: dict[str, Callable] = {"straightforward": straightforward, "ours": ours}
    if race:
        ways["race"] = lambda task: ours(task, Race())
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    found = {}
    for repeat in range(repeats):
        for name, way in ways.items():
            stages, found[name] = way(task)
            runs[name].append(stages | {"end to end": sum(stages.values())})
            seconds = ", ".join(f"{stage} {value:.2f}" for stage, value in runs[name][-1].items())
            print(f"run {repeat + 1}, {name}: {seconds}", file=sys.stderr)
    header = ["seconds, median", "straightforward"]
    for name in list(ways)[1:]:
        header += [name, "faster by (least to most)"]
    yield f"| {' | '.join(header)} |"
    yield f"| --- |{' ---: |' * (len(header) - 1)}"
    for stage in ("fits", "scores", "end to end"):
        theirs = [run[stage] for run in runs["straightforward"]]
        cells = [stage, f"{statistics.median(theirs):.2f}"]
        for name in list(ways)[1:]:
            own = [run[stage] for run in runs[name]]
            ratios = [a / b for a, b in zip(theirs, own, strict=True)]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            cells += [f"{statistics.median(own):.2f}", spread]
        yield f"| {' | '.join(cells)} |"
    yield f"\nBars: scores {SPEED_BAR:g} times faster; the race, end to end, {RACE_BAR:g} times with the same winner."
    yield f"Runs: {repeats}, interleaved.\n"
    scores, whole = found["straightforward"], found["ours"]
    apart = max(abs(a - item.nll) / a for a, item in zip(scores, whole.candidates, strict=True))
    if apart > AGREEMENT:
        raise SystemExit(f"the scores differ by {apart:.1e}")
    yield f"Scores of the two ways differ by {apart:.1e} at most (bar {AGREEMENT:g})."
    yield f"A candidate holds {new_parameters(task):,} parameters of its own; the model has {parameters(task[1]):,}."
    best = whole.ranking
    near = [str(item.window.start) for item in best[1:] if item.indistinguishable]
    yield f"Winner: start {best[0].window.start}, perplexity {best[0].perplexity:.3f}; within its noise: starts " + (
        ", ".join(near) or "none"
    )
    if race:
        raced = found["race"]
        same = raced.winner.window == whole.winner.window
        blocks = sum(item.blocks for item in raced.candidates)
        yield (
            f"Race: {'the same winner' if same else f'ANOTHER winner, start {raced.winner.window.start}'}, "
            f"{blocks} of {len(raced.candidates) * len(raced.block_tokens)} blocks scored; seen by each start: "
            + ", ".join(str(item.blocks) for item in raced.candidates)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a MODEL with --calibration and --selection text; else random weights")
    parser.add_argument("--calibration")
    parser.add_argument("--selection")
    parser.add_argument("--rewrite", default="soft_shared")
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16384, help="of each text")
    parser.add_argument("--selection-tokens", type=int, help="with --model; default: --tokens")
    parser.add_argument("--context", type=int, default=1024, help="of the selection blocks")
    parser.add_argument("--width", type=int, default=768, help="of the random model")
    parser.add_argument("--vocabulary", type=int, default=50257, help="of the random model")
    parser.add_argument("--race", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the Markdown here")
    given = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    rewrite = from_record({"rewrite": given.rewrite, "n": given.n})
    if given.model:
        sources = {"calibration": given.calibration, "selection": given.selection}
        if None in sources.values():
            parser.error("--model needs --calibration and --selection")
        task = real_task(
            rewrite, given.model, sources, given.context, given.tokens, given.selection_tokens or given.tokens
        )
        name = Path(given.model).name
    else:
        config = GPT2Config(n_embd=given.width, vocab_size=given.vocabulary, bos_token_id=0, eos_token_id=0)
        task = random_task(rewrite, config, given.context, given.tokens)
        name = f"random weights, 12 layers of width {given.width}, {given.vocabulary:,} tokens"
    tokens = f"{task[4].tokens:,} tokens in blocks of {task[4].ids.shape[1]}"
    lines = [
        "# Speed of the window search",
        "",
        __doc__.split("\n\n")[2].strip(),
        "",
        f"{name}; {given.rewrite}, n = {given.n}; selection text: {tokens}; calibration: {task[3].tokens:,} tokens.",
        f"{platform.machine()}, {torch.get_num_threads()} threads; torch {torch.__version__}, "
        f"transformers {transformers.__version__}.",
        "",
        *compare(task, given.repeats, given.race),
    ]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if given.out is not None:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
