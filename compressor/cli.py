"""The command line: parse, call one function of the pipeline, print, exit code."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from . import options as command_line
from . import show
from .errors import UserError

if TYPE_CHECKING:
    from .session import Session

# Each command imports what it needs when it runs: `--help` must not wait for torch.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. 0 done, 2 the user's mistake (one line on stderr), 1 a bug, or a verification that failed."""
    notices: list[str] = []
    try:
        options, overrides = command_line.parse(list(sys.argv[1:] if arguments is None else arguments))
        with warnings.catch_warnings():
            _silence(options)
            code = COMMANDS[options.command](options, overrides, notices)
        sys.stdout.flush()
        for notice in notices if not options.quiet else []:
            print(notice, file=sys.stderr)
    except UserError as error:
        print(f"gpt2-compress: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor may Python complain when it flushes
        return 0
    except OSError as error:  # a folder that may not be read, a name that is too long: the machine's, not a bug
        print(f"gpt2-compress: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpt2-compress: interrupted", file=sys.stderr)
        return 130
    return code


def _silence(options: argparse.Namespace) -> None:
    """Libraries' own chatter: what matters is said by the command."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # importing it to say so would take a second
    if options.quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _session(options: argparse.Namespace, notices: list[str]) -> Session:
    from .session import Session

    return Session(
        device=options.device,
        dtype=options.dtype,
        seed=options.seed or 0,
        force=options.force,
        quiet=options.quiet,
        notice=notices.append,
    )


def _print(options: argparse.Namespace, body: dict[str, Any], text: str) -> int:
    """The result, and nothing else, to stdout."""
    print(json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False) if options.json else text)
    return 0


def _seeded(options: argparse.Namespace, overrides: list[str]) -> list[str]:
    return overrides if options.seed is None else [*overrides, f"seed={options.seed}"]


def _plan(options: argparse.Namespace, overrides: list[str], notices: list[str]) -> int:
    from . import pipeline, recipe

    body = pipeline.plan(recipe.load(options.recipe, _seeded(options, overrides)))
    return _print(options, body, show.plan(body))


def _align(options: argparse.Namespace, overrides: list[str], notices: list[str]) -> int:
    from . import pipeline
    from .recipe import Align

    if options.pairs == "chain" and (options.n is not None or options.anchor is not None):
        raise UserError("--n and --anchor are for --pairs direct; the chain of adjacent layers serves every window")
    solved = pipeline.align(
        options.run,
        options.model,
        options.data,
        Align(options.method, options.site, options.pairs, options.max_tokens),
        _session(options, notices),
        n=options.n,
        anchor="middle" if options.anchor is None else options.anchor,
        columns=pipeline.Columns(options.text_column, options.split),
    )
    rows = [{"anchor": item.anchor, "layer": item.layer, **dataclasses.asdict(item.quality)} for item in solved.solved]
    return _print(
        options,
        {"run": str(options.run), "method": solved.method, "tokens": solved.tokens, "pairs": rows},
        show.alignment(str(options.run), solved.method, solved.tokens, rows),
    )


def _rewrite(options: argparse.Namespace, overrides: list[str], notices: list[str]) -> int:
    from . import pipeline, recipe
    from .rewrites import from_record

    record: dict[str, Any] = {"rewrite": options.rewrite}
    if options.start is not None:
        record["start"] = options.start
    for override in overrides:
        key, _, text = override.partition("=")
        if key in record:
            raise UserError(f"{override}: {key} is {record[key]!r} already; give it once")
        record[key] = recipe.parse_yaml(text, override)
    body = pipeline.rewrite(options.run, [from_record(record)], _session(options, notices))
    return _print(options, {**body, "run": str(options.run)}, show.rewrite(str(options.run / "rewritten"), body))


def _benchmark(options: argparse.Namespace, overrides: list[str], notices: list[str]) -> int:
    from . import benchmark, pipeline, report

    if options.suite is not None:
        metrics = benchmark.suite(options.suite)["metrics"]
    else:
        metrics = ["perplexity", "size"] if options.metrics is None else options.metrics.split(",")
    if options.max_tokens is not None:
        metrics = [
            {
                "metric": name,
                **settings,
                **({"max_tokens": options.max_tokens} if "max_tokens" in benchmark.METRICS[name].settings else {}),
            }
            for name, settings in benchmark.check_metrics(metrics)
        ]
    sources: dict[str, str] = {}
    for item in options.data:
        metric, found, spec = item.partition("=")
        key, spec = (metric, spec) if found and metric in benchmark.METRICS else ("", item)
        if key in sources:
            raise UserError(
                f"--data {item}: one D is given already ({sources[key]}); others need METRIC=D, METRIC one of "
                f"{', '.join(sorted(benchmark.METRICS))}"
            )
        sources[key] = spec
    result = pipeline.run_benchmark(
        options.models,
        options.out,
        metrics,
        sources,
        _session(options, notices),
        columns=pipeline.Columns(options.text_column, options.split),
    )
    return _print(options, result.to_dict(), f"{report.table(result)}\n\nwritten to {options.out}")


def _inspect(options: argparse.Namespace, overrides: list[str], notices: list[str]) -> int:
    from . import pipeline

    body = pipeline.inspect(options.path)
    return _print(options, body, show.model(body))


def _verify(options: argparse.Namespace, overrides: list[str], notices: list[str]) -> int:
    from . import pipeline

    checks = pipeline.verify_model(options.path, _session(options, notices))
    passed = all(check.passed for check in checks)
    rows = [dataclasses.asdict(check) for check in checks]
    _print(options, {"ok": passed, "checks": rows}, show.checks(rows))
    return 0 if passed else 1


def _export(options: argparse.Namespace, overrides: list[str], notices: list[str]) -> int:
    from . import pipeline

    body = pipeline.export(options.path, options.dense, _session(options, notices))
    return _print(options, body, show.export(body))


def _demo(options: argparse.Namespace, overrides: list[str], notices: list[str]) -> int:
    from . import pipeline, recipe, report

    chosen = recipe.load(options.recipe, _seeded(options, overrides))
    result = pipeline.demo(options.run, chosen, _session(options, notices))
    return _print(options, result.to_dict(), f"{report.table(result)}\n\n{show.demo(str(options.run))}")


COMMANDS: dict[str, Callable[[argparse.Namespace, list[str], list[str]], int]] = {
    "plan": _plan,
    "align": _align,
    "rewrite": _rewrite,
    "benchmark": _benchmark,
    "inspect": _inspect,
    "verify": _verify,
    "export": _export,
    "demo": _demo,
}
