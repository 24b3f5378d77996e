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
from .errors import UserError, unknown

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
            if options.command not in SHARED and not _main_process():
                return 0
            code = COMMANDS[options.command](options, overrides, notices)
            _leave(options)
        sys.stdout.flush()
        for notice in notices if _main_process() and not options.quiet else []:
            print(notice, file=sys.stderr)
    except UserError as error:
        if _main_process():  # every process finds the same mistake
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


def _main_process() -> bool:
    """Of those that `accelerate launch` started: the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def _leave(options: argparse.Namespace) -> None:
    if options.command in SHARED and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from .processes import leave

        leave()


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
    from .processes import ALONE, processes
    from .session import Session

    return Session(
        device=options.device,
        dtype=options.dtype,
        seed=options.seed or 0,
        force=options.force,
        quiet=options.quiet,
        notice=notices.append,
        processes=processes() if options.command in SHARED else ALONE,
    )


def _print(options: argparse.Namespace, body: dict[str, Any], text: str) -> int:
    """The result, and nothing else, to stdout."""
    if not _main_process():
        return 0
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
    from . import pipeline
    from .rewrites import from_record

    start = "best" if options.best else options.start
    if options.best and options.start is not None:
        raise UserError(f"--best and --start {options.start} say two things; give one")
    record = command_line.rewrite_record(options.rewrite, overrides, {} if start is None else {"start": start})
    body = pipeline.rewrite(options.run, [from_record(record)], _session(options, notices))
    return _print(options, {**body, "run": str(options.run)}, show.rewrite(str(options.run / "rewritten"), body))


def _search(options: argparse.Namespace, overrides: list[str], notices: list[str]) -> int:
    from . import pipeline
    from .recipe import Search
    from .rewrites import from_record

    record = command_line.rewrite_record(options.rewrite, overrides, {"start": "best"})
    body = pipeline.search(
        options.run,
        from_record({key: value for key, value in record.items() if key != "start"}),  # not every rewrite has one
        Search(
            strategy=options.strategy,
            count=options.count,
            race=options.race,
            max_tokens=options.max_tokens,
            context=options.context,
            target_parameters=options.target_parameters,
            sizes=options.sizes,
        ),
        _session(options, notices),
        source=options.data,
        columns=pipeline.Columns(options.text_column, options.split),
    )
    return _print(options, {**body, "run": str(options.run)}, show.windows(str(options.run), body))


def _finetune(options: argparse.Namespace, overrides: list[str], notices: list[str]) -> int:
    from . import fields, pipeline, recipe

    if options.force and options.resume:
        raise UserError("--force begins anew and --resume goes on; give one")
    named = {name: getattr(options, name) for name in ("steps", "train", "distill", "control")}
    given = {name: value for name, value in named.items() if value not in (None, False)}
    record = {"control": False, **given, **command_line.keys(overrides, given)}
    settings = fields.from_record(recipe.Finetune, record, "finetune")
    bodies = pipeline.finetune(
        options.run,
        settings,
        _session(options, notices),
        source=options.data,
        columns=pipeline.Columns(options.text_column, options.split),
        resume=options.resume,
    )
    return _print(options, {"run": str(options.run), **bodies}, show.recovery(str(options.run), bodies))


def _run(options: argparse.Namespace, overrides: list[str], notices: list[str]) -> int:
    from . import pipeline, recipe, report

    chosen = recipe.load(options.recipe, _seeded(options, overrides))
    folder = options.run or pipeline.run_name(options.recipe)
    columns = pipeline.Columns(options.text_column, options.split)
    result = pipeline.run(folder, chosen, _session(options, notices), columns=columns)
    return _print(
        options,
        result.to_dict(),
        f"{report.table(result)}\n\n{show.run(str(folder), [row.name for row in result.rows])}",
    )


def _study(options: argparse.Namespace, overrides: list[str], notices: list[str]) -> int:
    from . import pipeline, report, studies

    if options.study not in studies.STUDIES:
        raise unknown("study", options.study, studies.STUDIES)
    study = studies.STUDIES[options.study]
    folder = options.run or pipeline.run_name(options.study)
    given, session = _seeded(options, overrides), _session(options, notices)
    columns = pipeline.Columns(options.text_column, options.split)
    if isinstance(study, studies.CountStudy | studies.MeasuredStudy):
        if isinstance(study, studies.CountStudy):
            counted = studies.run_counts(study, folder, given, session, columns=columns)
        else:
            counted = studies.run_measured(study, folder, overrides, session, columns=columns)
        told = report.text(counted.tables, counted.findings)
        return _print(options, counted.body, f"{told}\n\n{show.written(str(folder))}")
    result = studies.run_study(
        study,
        folder,
        given,
        session,
        columns=columns,
        tell=lambda message: None if options.quiet or not _main_process() else print(message, file=sys.stderr),
    )
    return _print(
        options, result.to_dict(), f"{report.table(result)}\n\n{folder}/report.md has the tables and pictures"
    )


def _benchmark(options: argparse.Namespace, overrides: list[str], notices: list[str]) -> int:
    from . import benchmark, pipeline, report, suite

    if options.suite is not None:
        metrics = suite.load(options.suite)["metrics"]
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
    result = pipeline.compare(
        options.models,
        options.out,
        metrics,
        sources,
        _session(options, notices),
        columns=pipeline.Columns(options.text_column, options.split),
        others=[] if options.baselines is None else options.baselines.split(","),
    )
    return _print(options, result.to_dict(), f"{report.table(result)}\n\n{show.written(str(options.out))}")


def _slice(options: argparse.Namespace, overrides: list[str], notices: list[str]) -> int:
    from . import pipeline

    given = {name: getattr(options, name) for name in ("ffn", "width", "depth", "head")}
    body = pipeline.slice_model(
        options.model,
        options.out,
        _session(options, notices),
        choice={name: value for name, value in given.items() if value is not None},
        max_parameters=options.max_parameters,
        max_latency=options.max_latency,
        source=options.data,
        columns=pipeline.Columns(options.text_column, options.split),
        max_tokens=options.max_tokens,
    )
    return _print(options, {**body, "path": str(options.out)}, show.cut(str(options.out), body))


def _report(options: argparse.Namespace, overrides: list[str], notices: list[str]) -> int:
    from . import pipeline, report

    result = pipeline.gather(options.runs, options.out, _session(options, notices))
    return _print(options, result.to_dict(), f"{report.table(result)}\n\n{show.written(str(options.out))}")


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


COMMANDS: dict[str, Callable[[argparse.Namespace, list[str], list[str]], int]] = {
    "plan": _plan,
    "align": _align,
    "search": _search,
    "rewrite": _rewrite,
    "finetune": _finetune,
    "benchmark": _benchmark,
    "run": _run,
    "study": _study,
    "slice": _slice,
    "report": _report,
    "inspect": _inspect,
    "verify": _verify,
    "export": _export,
    "demo": _run,
}
SHARED = ("align", "search", "finetune", "run", "study", "demo")  # what several processes do together
