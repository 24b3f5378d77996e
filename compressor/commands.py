"""The commands and the options of each. Imports nothing heavy, so that `--help` answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from . import __version__
from .arguments import each_layer, folder, layer_or_word, positive, seed, share, share_or_number, sizes, tokens
from .errors import UserError

_MODEL = "a hub name, a save_pretrained folder, a run folder, or demo"
_DATA = "NAME[:CONFIG] on the hub, a .txt .jsonl .csv .parquet file, a folder of them, or demo"


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a UserError; knows its options, so that the others can be told apart."""

    takes_keys = False

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")

    @property
    def values(self) -> dict[str, bool]:
        """Option -> whether a value follows it."""
        return {name: action.nargs != 0 for action in self._actions for name in action.option_strings}


def build() -> tuple[Parser, dict[str, Parser]]:
    """The parser, and the parser of each command by name."""
    parser = Parser(
        prog="gpt2-compress",
        description="Make pretrained GPT-2 checkpoints smaller and faster, and prove what that cost.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  gpt2-compress demo\n"
        "  gpt2-compress run soft_shared model=gpt2 data=wikitext\n"
        "  gpt2-compress plan compressed_4 model=gpt2\n"
        "  gpt2-compress align --model gpt2 --data wikitext --run runs/mine\n"
        "  gpt2-compress rewrite --run runs/mine --rewrite soft_shared --n 4 --rank 8\n"
        "  gpt2-compress finetune --run runs/mine --steps 100 --control\n"
        "  gpt2-compress benchmark runs/mine --out runs/mine --data wikitext",
    )
    parser.add_argument("--version", action="version", version=f"gpt2-compress {__version__}")
    group = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    commands: dict[str, Parser] = {}

    def command(name: str, summary: str, *examples: str, keys: bool = False) -> Parser:
        added = group.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            epilog="examples:\n  "
            + "\n  ".join(f"gpt2-compress {example}" for example in examples)
            + ("\n\nkey=value (such as rank=16) may stand anywhere; --rank 16 is short for it." if keys else ""),
        )
        added.takes_keys = keys
        commands[name] = added
        _common(added)
        return added

    _plan(command)
    _align(command)
    _search(command)
    _rewrite(command)
    _finetune(command)
    _benchmark(command)
    _run(command)
    _study(command)
    _slice(command)
    _report(command)
    inspect = command("inspect", "what a model or a run is", "inspect runs/mine")
    inspect.add_argument("path", metavar="PATH", help=_MODEL)
    verify = command("verify", "reopen in a fresh process: logits, cache, parameters, bytes", "verify runs/mine")
    verify.add_argument("path", metavar="PATH", help=_MODEL)
    export = command(
        "export", "fold to dense plain GPT-2, for llama.cpp, vLLM, ONNX", "export runs/mine --dense my-gpt2-dense"
    )
    export.add_argument("path", metavar="PATH", help=_MODEL)
    export.add_argument("--dense", required=True, metavar="OUT", type=folder, help="the folder to write")
    demo = command(
        "demo",
        "the whole pipeline on the embedded model, offline",
        "demo",
        "demo --recipe compressed_4 --run runs/shallow",
        keys=True,
    )
    demo.add_argument("--recipe", default="soft_shared", metavar="RECIPE", help="default: soft_shared")
    demo.add_argument("--run", type=folder, metavar="DIR", default=Path("runs/demo"), help="default: runs/demo")
    demo.set_defaults(text_column=None, split=None)
    return parser, commands


Command = Callable[..., Parser]


def _common(parser: Parser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--dtype", help="to compute in: float32 (default), bfloat16, float16; files keep their own")
    parser.add_argument("--seed", type=seed, help="default: 0, or the recipe's")
    parser.add_argument("--force", action="store_true", help="replace what is there; verify: run foreign code")
    parser.add_argument("--quiet", action="store_true", help="no progress bars, no notices")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def _columns(parser: Parser) -> None:
    parser.add_argument("--text-column", metavar="C", help="the column that holds the text")
    parser.add_argument("--split", metavar="S", help="use this split of the data only")


def _plan(command: Command) -> None:
    plan = command(
        "plan",
        "what would come out: layers, parameters, bytes, FLOPs, time",
        "plan soft_shared rank=16",
        "plan compressed_6 model=gpt2-medium --json",
        keys=True,
    )
    plan.add_argument("recipe", metavar="RECIPE", help="a recipe's name or a .yaml file")


def _align(command: Command) -> None:
    align = command(
        "align",
        "capture activations and match neurons across layers (steps 1 and 2)",
        "align --model gpt2 --data wikitext --run runs/mine",
        "align --model ./my-gpt2 --data my.txt --run runs/mine --method weight",
    )
    align.add_argument("--model", required=True, metavar="M", help=_MODEL)
    align.add_argument("--data", default="demo", metavar="D", help=_DATA)
    align.add_argument("--run", required=True, metavar="DIR", type=folder, help="the run folder to write into")
    align.add_argument("--max-tokens", type=tokens, default=4000, metavar="N", help="calibration tokens: 4000")
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
        "--anchor",
        type=layer_or_word,
        metavar="A",
        help="first, middle (default), last or a layer, for --pairs direct",
    )
    _columns(align)


def _search(command: Command) -> None:
    search = command(
        "search",
        "score the windows that a rewrite may take, by perplexity right after it (step 3)",
        "search --run runs/mine --rewrite soft_shared --n 4 --rank 8",
        "search --run runs/mine --rewrite compressed_n --n 4 --race --max-tokens 65536",
        "search --run runs/mine --rewrite merged_n tie=true --target-parameters 100M --sizes 2,4",
        keys=True,
    )
    search.add_argument("--run", required=True, metavar="DIR", type=folder, help="a run folder that `align` made")
    search.add_argument("--rewrite", required=True, metavar="NAME", help="soft_shared, merged_n, compressed_n")
    search.add_argument("--data", metavar="D", help=f"selection text (default: the run's): {_DATA}")
    search.add_argument("--strategy", choices=("all", "middle", "random"), default="all", help="which windows: all")
    search.add_argument("--count", type=positive, default=1, metavar="N", help="how many, for --strategy random")
    search.add_argument("--race", action="store_true", help="drop windows that are clearly behind")
    search.add_argument("--max-tokens", type=tokens, default=16384, metavar="N", help="selection tokens: 16384")
    search.add_argument("--context", type=tokens, metavar="N", help="of a selection block: 256, or the model's")
    search.add_argument("--target-parameters", metavar="N", help="such as 100M: several windows jointly, down to this")
    search.add_argument("--sizes", type=sizes, metavar="N,N", help="the n that these windows may have")
    _columns(search)


def _rewrite(command: Command) -> None:
    rewrite = command(
        "rewrite",
        "replace sublayers and fit the result (step 4)",
        "rewrite --run runs/mine --rewrite soft_shared --n 4 --rank 8",
        "rewrite --run runs/mine --rewrite compressed_n --start 4 n=4 collapse=fit",
        keys=True,
    )
    rewrite.add_argument("--run", required=True, metavar="DIR", type=folder, help="a run folder that `align` made")
    rewrite.add_argument(
        "--rewrite",
        required=True,
        metavar="NAME",
        help="such as soft_shared, compressed_n or alibi: any of the README's table; a wrong one lists them",
    )
    rewrite.add_argument(
        "--start", type=int, metavar="S", help="first layer of the window (default: the search's, else the middle)"
    )
    rewrite.add_argument("--best", action="store_true", help="take what `search` found, or fail")


def _finetune(command: Command) -> None:
    tune = command(
        "finetune",
        "recover by a short training (step 5)",
        "finetune --run runs/mine --steps 100 --control",
        "finetune --run runs/mine --train full --learning-rate 1e-4 --distill --data wikitext",
        "finetune --run runs/mine --steps 100 --control --resume",
        keys=True,
    )
    tune.add_argument("--run", required=True, metavar="DIR", type=folder, help="a run folder that `rewrite` made")
    tune.add_argument("--data", metavar="D", help=f"training and selection text (default: the run's): {_DATA}")
    tune.add_argument("--steps", type=positive, metavar="N", help="default: 100, of 4096 tokens each")
    tune.add_argument(
        "--train",
        choices=("auto", "deltas", "lora", "full"),
        help="what is trained: the deltas; adapters that are merged at the end, with what is new in attention in "
        "blocks; everything; auto (default): deltas where there are any, else lora",
    )
    tune.add_argument("--distill", action="store_true", help="learn from the original's predictions")
    tune.add_argument("--control", action="store_true", help="also tune the original on the same budget")
    tune.add_argument("--resume", action="store_true", help="go on where an interrupted one stopped")
    _columns(tune)


def _run(command: Command) -> None:
    run = command(
        "run",
        "all of it: align, search, rewrite, finetune, benchmark; an interrupted run goes on",
        "run soft_shared model=gpt2 data=wikitext",
        "run compressed_4 --run runs/shallow finetune.steps=500",
        "run my-recipe.yaml search.race=true",
        keys=True,
    )
    run.add_argument("recipe", metavar="RECIPE", help="a recipe's name or a .yaml file")
    run.add_argument("--run", type=folder, metavar="DIR", help="default: runs/RECIPE")
    _columns(run)


def _study(command: Command) -> None:
    study = command(
        "study",
        "many models beside each other, with one report: code_n_all, soft_shared, extrapolation, matryoshka, whose "
        "interrupted runs go on; attention, which measures attentions; tversky_scaling, which counts",
        "study code_n_all",
        "study code_n_all model=gpt2 data=wikitext finetune.steps=500 --run runs/gpt2",
        "study soft_shared model=./my-gpt2 data=my.txt",
        "study matryoshka model=gpt2 data=wikitext --run runs/nested",
        "study tversky_scaling --run runs/counts",
        "study attention model=gpt2 data=wikitext lengths=[512,1024,2048] knob_length=1024",
        keys=True,
    )
    study.add_argument(
        "study", metavar="NAME", help="code_n_all, soft_shared, extrapolation, matryoshka, attention or tversky_scaling"
    )
    study.add_argument("--run", type=folder, metavar="DIR", help="default: runs/NAME")
    _columns(study)


def _benchmark(command: Command) -> None:
    bench = command(
        "benchmark",
        "measure models side by side (step 6)",
        "benchmark gpt2 runs/mine --data wikitext --out bench",
        "benchmark runs/mine --out bench --suite quick --data perplexity=my.txt",
        "benchmark runs/mine --out bench --baselines pruned,dropped,distilgpt2",
    )
    bench.add_argument("models", nargs="+", metavar="MODEL", help=f"{_MODEL}; a run folder gives all of its models")
    bench.add_argument("--out", required=True, metavar="DIR", type=folder, help="where the report goes")
    chosen = bench.add_mutually_exclusive_group()
    chosen.add_argument(
        "--metrics",
        metavar="A,B,C",
        help="default: perplexity,size; more: latency,extrapolation,assisted,imdb,rouge,generation",
    )
    chosen.add_argument("--suite", metavar="NAME", help="quick, full, or a .yaml file")
    bench.add_argument("--data", nargs="+", default=[], metavar="[METRIC=]D", help=_DATA)
    bench.add_argument(
        "--baselines",
        metavar="A,B,C",
        help="rows to compare with: pruned (the original, to as many parameters), dropped (without as many blocks), "
        "which are made in the run folder and recovered as the run was, or a MODEL such as distilgpt2",
    )
    bench.add_argument(
        "--max-tokens",
        type=tokens,
        metavar="N",
        help="score the first N tokens only (default: all; of extrapolation and assisted 16384)",
    )
    _columns(bench)


def _slice(command: Command) -> None:
    cut = command(
        "slice",
        "cut a smaller model out of a nested one (rewrite matryoshka), by its size or by a budget",
        "slice runs/matryoshka --ffn 0.5 --out half",
        "slice runs/mine --ffn 3072,3072,1536,1536,1536,768 --depth 6 --out mixed",
        "slice runs/mine --width 384 --out narrow",
        "slice runs/matryoshka --max-parameters 100M --out best-100M",
        "slice runs/matryoshka --max-latency 0.7 --data wikitext --out fast",
    )
    cut.add_argument("model", metavar="MODEL", help=f"{_MODEL}, with smaller models nested in it")
    cut.add_argument("--out", required=True, metavar="DIR", type=folder, help="the folder to write")
    kept = "how many are kept; with a dot a share of the whole, such as 0.5"
    cut.add_argument("--ffn", type=each_layer, metavar="N[,N,...]", help=f"neurons, or those of each layer: {kept}")
    cut.add_argument("--width", type=share_or_number, metavar="N", help="numbers of the residual stream")
    cut.add_argument("--depth", type=share_or_number, metavar="N", help="layers")
    cut.add_argument("--head", type=share_or_number, metavar="N", help="coordinates that the logits are made of")
    cut.add_argument(
        "--max-parameters",
        metavar="N",
        help="such as 100M: of what has no more, the slice with the best measured perplexity",
    )
    cut.add_argument(
        "--max-latency",
        type=share,
        metavar="SHARE",
        help="of the whole model's time to generate, such as 0.7",
    )
    cut.add_argument("--data", metavar="D", help=f"what a budget is met on (default: the model's own): {_DATA}")
    cut.add_argument("--max-tokens", type=tokens, metavar="N", help="selection tokens: 16384")
    _columns(cut)


def _report(command: Command) -> None:
    gathered = command(
        "report",
        "one report of the reports of several runs: tables, plots, a page",
        "report runs/merged_4 runs/compressed_4 --out runs/both",
        "report runs/mine bench --out all --json",
    )
    gathered.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or a folder that `benchmark` wrote")
    gathered.add_argument("--out", required=True, metavar="DIR", type=folder, help="where the report goes")
