"""The command line: parse, call one function of the pipeline, print, exit code."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__, show
from .errors import UserError, unknown

_OVERRIDE = re.compile(r"^[A-Za-z_][\w.]*=")
_MODEL = "a hub name, a save_pretrained folder, a run folder, or demo"
_DATA = "NAME[:CONFIG] on the hub, a .txt .jsonl .csv .parquet file, a folder of them, or demo"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. 0 done, 2 the user's mistake (one line on stderr), 1 a bug."""
    notices: list[str] = []
    try:
        options, overrides = _parse(list(sys.argv[1:] if arguments is None else arguments))
        _silence()
        code = options.function(options, overrides, notices)
        for notice in notices if not options.quiet else []:
            print(notice, file=sys.stderr)
    except UserError as error:
        print(f"gpt2-compress: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpt2-compress: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head`
        return 0
    return code


def _silence() -> None:
    """Libraries' own chatter: what matters is said by the command."""
    import warnings

    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore")


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = _parser()
    overrides, rest = _split_overrides(arguments)
    options, extra = parser.parse_known_args(rest)
    if extra:
        overrides += _knobs(options, extra)
    if overrides and not getattr(options, "takes_keys", False):
        raise UserError(f"`{options.command}` takes no key=value: {overrides[0]}")
    return options, overrides


def _split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """key=value may stand anywhere on the line, but not where an option expects its value."""
    overrides, rest = [], []
    for index, argument in enumerate(arguments):
        before = arguments[index - 1] if index else ""
        if _OVERRIDE.match(argument) and not (before in _VALUE_OPTIONS or "--data" in arguments[:index]):
            overrides.append(argument)
        else:
            rest.append(argument)
    return overrides, rest


_VALUE_OPTIONS = {
    "--run",
    "--model",
    "--out",
    "--data",
    "--text-column",
    "--split",
    "--dense",
    "--device",
    "--dtype",
    "--seed",
}


def _knobs(options: argparse.Namespace, extra: list[str]) -> list[str]:
    """`--rank 8` and the like are short for the rewrite's `rank=8`."""
    from .rewrites import REWRITES

    fields = sorted({field.name for kind in REWRITES.values() for field in dataclasses.fields(kind)})
    overrides, position = [], 0
    while position < len(extra):
        word, _, value = extra[position].partition("=")
        name = word.removeprefix("--").replace("-", "_")
        if not word.startswith("--") or not getattr(options, "takes_keys", False):
            raise UserError(f"unknown argument {extra[position]!r}; see `gpt2-compress {options.command} --help`")
        if name not in fields:
            raise unknown("option", word, [f"--{field.replace('_', '-')}" for field in fields])
        if not value:
            position += 1
            if position >= len(extra):
                raise UserError(f"{word} needs a value")
            value = extra[position]
        overrides.append(f"{name}={value}")
        position += 1
    return overrides


# ---------------------------------------------------------------- the commands


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gpt2-compress",
        description="Make pretrained GPT-2 checkpoints smaller and faster, and prove what that cost.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  gpt2-compress demo\n  gpt2-compress plan compressed_4 model=gpt2\n"
        "  gpt2-compress align --model gpt2 --data wikitext --run runs/mine\n"
        "  gpt2-compress rewrite --run runs/mine --rewrite soft_shared --n 4 --rank 8\n"
        "  gpt2-compress benchmark runs/mine --out runs/mine --data wikitext",
    )
    parser.add_argument("--version", action="version", version=f"gpt2-compress {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    plan = _command(
        commands,
        "plan",
        _plan,
        "what would come out: layers, parameters, bytes, FLOPs, time",
        "gpt2-compress plan soft_shared rank=16\n  gpt2-compress plan compressed_6 model=gpt2-medium --json",
        keys=True,
    )
    plan.add_argument("recipe", metavar="RECIPE", help="a recipe's name or a .yaml file")

    align = _command(
        commands,
        "align",
        _align,
        "capture activations and match neurons across layers (steps 1 and 2)",
        "gpt2-compress align --model gpt2 --data wikitext --run runs/mine\n"
        "  gpt2-compress align --model ./my-gpt2 --data my.txt --run runs/mine --method weight",
    )
    align.add_argument("--model", required=True, metavar="M", help=_MODEL)
    align.add_argument("--data", default="demo", metavar="D", help=_DATA)
    align.add_argument("--run", required=True, metavar="DIR", type=Path, help="the run folder to write into")
    align.add_argument("--max-tokens", type=int, default=4000, metavar="N", help="calibration tokens (default 4000)")
    align.add_argument("--site", choices=("pre", "post"), default="pre", help="before or after the activation function")
    align.add_argument("--method", choices=("activation", "weight", "none"), default="activation")
    align.add_argument(
        "--pairs",
        choices=("chain", "direct"),
        default="chain",
        help="adjacent layers only, or also each layer of a window with its anchor",
    )
    align.add_argument("--n", type=int, metavar="K", help="window length, for --pairs direct")
    align.add_argument(
        "--anchor", default="middle", metavar="A", help="first, middle, last or a layer (--pairs direct)"
    )
    _columns(align)

    rewrite = _command(
        commands,
        "rewrite",
        _rewrite,
        "replace sublayers and fit the result (step 4)",
        "gpt2-compress rewrite --run runs/mine --rewrite soft_shared --n 4 --rank 8\n"
        "  gpt2-compress rewrite --run runs/mine --rewrite compressed_n --start 4 n=4 collapse=fit",
        keys=True,
    )
    rewrite.add_argument("--run", required=True, metavar="DIR", type=Path, help="a run folder that `align` made")
    rewrite.add_argument("--rewrite", required=True, metavar="NAME", help="soft_shared, merged_n, compressed_n")
    rewrite.add_argument(
        "--start", type=int, metavar="S", help="first layer of the window (default: the middle window)"
    )

    bench = _command(
        commands,
        "benchmark",
        _benchmark,
        "measure models side by side (step 6)",
        "gpt2-compress benchmark gpt2 runs/mine --data wikitext --out bench\n"
        "  gpt2-compress benchmark runs/mine --out bench --suite quick --data perplexity=my.txt",
    )
    bench.add_argument("models", nargs="+", metavar="MODEL", help=f"{_MODEL}; a run folder gives all of its models")
    bench.add_argument("--out", required=True, metavar="DIR", type=Path, help="where the report goes")
    chosen = bench.add_mutually_exclusive_group()
    chosen.add_argument("--metrics", metavar="A,B,C", help="default: perplexity,size")
    chosen.add_argument("--suite", metavar="NAME", help="quick, full, or a .yaml file")
    bench.add_argument("--data", nargs="+", default=[], metavar="[METRIC=]D", help=_DATA)
    bench.add_argument("--max-tokens", type=int, metavar="N", help="score the first N tokens only (default: all)")
    _columns(bench)

    inspect = _command(commands, "inspect", _inspect, "what a model or a run is", "gpt2-compress inspect runs/mine")
    inspect.add_argument("path", metavar="PATH", help=_MODEL)
    verify = _command(
        commands,
        "verify",
        _verify,
        "reopen in a fresh process: logits, cache, parameters, bytes",
        "gpt2-compress verify runs/mine",
    )
    verify.add_argument("path", metavar="PATH", help=_MODEL)
    export = _command(
        commands,
        "export",
        _export,
        "fold to dense plain GPT-2, for llama.cpp, vLLM, ONNX",
        "gpt2-compress export runs/mine --dense my-gpt2-dense",
    )
    export.add_argument("path", metavar="PATH", help=_MODEL)
    export.add_argument("--dense", required=True, metavar="OUT", type=Path, help="the folder to write")

    demo = _command(
        commands,
        "demo",
        _demo,
        "the whole pipeline on the embedded model, offline",
        "gpt2-compress demo\n  gpt2-compress demo --recipe compressed_4 --run runs/shallow",
        keys=True,
    )
    demo.add_argument("--recipe", default="soft_shared", metavar="RECIPE", help="default: soft_shared")
    demo.add_argument("--run", type=Path, metavar="DIR", help="default: runs/demo")
    return parser


def _command(
    commands: Any, name: str, function: Callable, summary: str, examples: str, *, keys: bool = False
) -> _Parser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog=f"examples:\n  {examples}"
        + ("\n\nkey=value (such as rank=16, align.max_tokens=8000) may stand anywhere." if keys else ""),
    )
    parser.set_defaults(function=function, takes_keys=keys)
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--dtype", help="to compute in: float32 (default), bfloat16, float16; files keep their own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace what is there")
    parser.add_argument("--quiet", action="store_true", help="no progress bars, no notices")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _columns(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text-column", metavar="C", help="the column that holds the text")
    parser.add_argument("--split", metavar="S", help="use this split of the data only")


def _session(options: argparse.Namespace, notices: list[str]) -> Any:
    from .pipeline import Session

    return Session(
        device=options.device,
        dtype=options.dtype,
        seed=options.seed,
        force=options.force,
        quiet=options.quiet,
        notice=notices.append,
    )


def _print(options: argparse.Namespace, body: dict[str, Any], text: str) -> int:
    """The result, and nothing else, to stdout."""
    print(json.dumps(body, indent=2, ensure_ascii=False) if options.json else text)
    return 0


def _plan(options: argparse.Namespace, overrides: list[str], notices: list[str]) -> int:
    from . import pipeline, recipe

    body = pipeline.plan(recipe.load(options.recipe, overrides))
    return _print(options, body, show.plan(body))


def _align(options: argparse.Namespace, overrides: list[str], notices: list[str]) -> int:
    from . import pipeline
    from .recipe import Align

    if options.max_tokens < 2:
        raise UserError(f"--max-tokens is {options.max_tokens}; allowed: 2 or more")
    anchor: str | int = int(options.anchor) if options.anchor.isdigit() else options.anchor
    settings = Align(options.method, options.site, options.pairs, options.max_tokens)
    solved = pipeline.align(
        options.run,
        options.model,
        options.data,
        settings,
        _session(options, notices),
        n=options.n,
        anchor=anchor,
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
        record[key] = recipe.parse_yaml(text, override)
    body = pipeline.rewrite(options.run, [from_record(record)], _session(options, notices))
    return _print(options, {**body, "run": str(options.run)}, show.rewrite(str(options.run / "rewritten"), body))


def _benchmark(options: argparse.Namespace, overrides: list[str], notices: list[str]) -> int:
    from . import benchmark, pipeline, report

    if options.suite:
        metrics = benchmark.suite(options.suite)["metrics"]
    else:
        metrics = options.metrics.split(",") if options.metrics else ["perplexity", "size"]
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
        if found and metric in benchmark.METRICS:
            sources[metric] = spec
        elif "" in sources:
            raise UserError(
                f"--data {item}: one D is given already ({sources['']}); others need METRIC=D, METRIC one of "
                f"{', '.join(sorted(benchmark.METRICS))}"
            )
        else:
            sources[""] = item
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
    lines = [f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.detail}" for check in checks]
    _print(options, {"ok": passed, "checks": [dataclasses.asdict(check) for check in checks]}, "\n".join(lines))
    return 0 if passed else 1


def _export(options: argparse.Namespace, overrides: list[str], notices: list[str]) -> int:
    from . import pipeline

    body = pipeline.export(options.path, options.dense, _session(options, notices))
    return _print(
        options,
        body,
        f"{options.dense}: plain GPT-2, {body['layers']} layers, {body['parameters']:,} parameters, "
        f"{body['bytes']:,} bytes",
    )


def _demo(options: argparse.Namespace, overrides: list[str], notices: list[str]) -> int:
    from . import pipeline, recipe, report

    chosen = recipe.load(options.recipe, overrides)
    run = options.run or Path("runs") / "demo"
    result = pipeline.demo(run, chosen, _session(options, notices))
    return _print(
        options,
        result.to_dict(),
        f"{report.table(result)}\n\n{run}/rewritten opens with from_pretrained; "
        f"`gpt2-compress verify {run}` proves it; {run}/report.md has the table",
    )
