"""TverskyGPT beside GPT-2: what its parameters are, with one bank for all layers and with a bank a layer.

The notebook of the source compared "shared" with "non-shared" by a count that left the banks out, and printed a
reduction of 0.00 % for every size. Counted, there is one; but both are larger than the GPT-2 of their shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from transformers import GPT2Config

from .. import gpt2
from ..checkpoint import build
from ..report import layout
from ..report.layout import Table
from ..tversky_gpt import (
    count_parameters,
    estimate_memory_mb,
    get_shared_parameter_info,
    paper_config,
    tversky_gpt_config,
)
from .counts import CountStudy
from .outcome import Outcome
from .tversky_pictures import more, per_cent, pictures

SHAPES = {"Small": (128, 4, 4), "Medium": (256, 6, 8), "Large": (512, 8, 8), "GPT-2 small": (768, 12, 12)}
Setting = Literal["tied", "untied", "head"]
# What the paper gives for a setting of its GPT-2 small on PTB, in millions: before, after; and what was replaced.
PAPER: dict[Setting, tuple[float, float, str]] = {
    "tied": (124.44, 81.14, "FFNs and head, tied"),
    "untied": (163.04, 116.59, "FFNs and head, untied"),
    "head": (163.04, 175.62, "head only, untied"),
}


@dataclass(frozen=True)
class _Shape:
    """The three models of a shape, on the meta device."""

    name: str
    config: GPT2Config
    gpt2: Any
    shared: Any
    apart: Any

    @property
    def models(self) -> dict[str, Any]:
        return {"gpt2": self.gpt2, "shared": self.shared, "not_shared": self.apart}

    @property
    def counts(self) -> tuple[int, int, int]:
        return count_parameters(self.gpt2), count_parameters(self.shared), count_parameters(self.apart)

    @property
    def memory(self) -> tuple[float, float, float]:
        return estimate_memory_mb(self.gpt2), estimate_memory_mb(self.shared), estimate_memory_mb(self.apart)


def _shape(name: str) -> _Shape:
    d, layers, heads = SHAPES[name]
    config = GPT2Config(n_embd=d, n_layer=layers, n_head=heads)
    shared, apart = tversky_gpt_config(config), tversky_gpt_config(config, share_across_layers=False)
    return _Shape(f"{name} {d}/{layers}/{heads}", config, build(config), build(shared), build(apart))


def count() -> Outcome:
    """Build every structure and count it."""
    shapes = [_shape(name) for name in SHAPES]
    papers = {setting: _paper(setting) for setting in get_args(Setting)}
    names, counts, memory = zip(*((shape.name, shape.counts, shape.memory) for shape in shapes), strict=True)
    return Outcome(
        body={"rows": [_record(shape) for shape in shapes], "paper": list(papers.values())},
        tables=(_parameters(shapes), _memory(shapes), _banks(shapes), _papers(papers)),
        findings=tuple(_findings(shapes, papers)),
        pictures=tuple(pictures(names, counts, memory, list(papers.values()))),
    )


TVERSKY_SCALING = CountStudy("tversky_scaling", "TverskyGPT beside GPT-2: what its parameters are", count)


# ---------------------------------------------------------------- figures


def _record(shape: _Shape) -> dict[str, Any]:
    dense, shared, apart = shape.counts
    return {
        "shape": shape.name,
        **{name: getattr(shape.config, name) for name in ("n_embd", "n_layer", "n_head", "n_positions", "vocab_size")},
        "n_inner": gpt2.d_ff(shape.config),
        "parameters": dict(zip(shape.models, shape.counts, strict=True)),
        "memory_mb": dict(zip(shape.models, shape.memory, strict=True)),
        "shared_against_gpt2_percent": more(shared, dense),
        "not_shared_against_gpt2_percent": more(apart, dense),
        "shared_against_not_shared_percent": more(shared, apart),
        "saved_by_sharing": apart - shared,
        "banks": get_shared_parameter_info(shape.shared),
    }


def _paper(setting: Setting) -> dict[str, Any]:
    config = paper_config(setting)
    before = count_parameters(build(GPT2Config(tie_word_embeddings=config.tie_word_embeddings)))
    after, ((_, features),) = count_parameters(build(config)), config.tversky[0]["features"].items()  # type: ignore
    given_before, given_after, words = PAPER[setting]
    return {
        "setting": setting,
        "replaced": words,
        "features": features,
        "gpt2": before,
        "tversky": after,
        "against_gpt2_percent": more(after, before),
        "paper_gpt2_millions": given_before,
        "paper_tversky_millions": given_after,
    }


# ---------------------------------------------------------------- tables


def _parameters(shapes: list[_Shape]) -> Table:
    counts = [shape.counts for shape in shapes]
    columns = {
        "shape": [shape.name for shape in shapes],
        "GPT-2": [f"{dense:,}" for dense, _, _ in counts],
        "Tversky, shared": [f"{shared:,}" for _, shared, _ in counts],
        "shared to GPT-2": [per_cent(more(shared, dense)) for dense, shared, _ in counts],
        "not shared": [f"{apart:,}" for _, _, apart in counts],
        "not shared to GPT-2": [per_cent(more(apart, dense)) for dense, _, apart in counts],
        "shared to not": [per_cent(more(shared, apart)) for _, shared, apart in counts],
        "saved by sharing": [f"{apart - shared:,}" for _, shared, apart in counts],
    }
    return layout.make(
        columns,
        "Parameters",
        "Shapes are width/layers/heads; 50,257 tokens, 1,024 positions, inner width 4 x width. Shared: all layers use "
        "one bank for each width of inputs; not shared: each layer has its own. Counted over unique storages, banks "
        "and scalars among them.",
    )


def _memory(shapes: list[_Shape]) -> Table:
    memory = [shape.memory for shape in shapes]
    columns = {
        "shape": [shape.name for shape in shapes],
        "GPT-2": [f"{dense:,.1f}" for dense, _, _ in memory],
        "Tversky, shared": [f"{shared:,.1f}" for _, shared, _ in memory],
        "not shared": [f"{apart:,.1f}" for _, _, apart in memory],
        "shared - GPT-2": [f"{shared - dense:+,.1f}" for dense, shared, _ in memory],
        "shared - not": [f"{shared - apart:+,.1f}" for _, shared, apart in memory],
    }
    return layout.make(
        columns,
        "Memory of the parameters, MiB",
        "4 bytes a parameter (float32, inference). Activations and the cache of keys and values are not in it; "
        "training with Adam takes four times as much.",
    )


def _banks(shapes: list[_Shape]) -> Table:
    found = [get_shared_parameter_info(shape.shared) for shape in shapes]
    wide = [max(info["shared_parameters"].values()) for info in found]
    columns = {
        "shape": [shape.name for shape in shapes],
        "banks": [f"{info['total_shared_params']:,}" for info in found],
        "of the inner width": [f"{most:,}" for most in wide],
        "part of the model": [f"{info['shared_percentage']:.1f} %" for info in found],
    }
    return layout.make(
        columns,
        "What is shared",
        "The banks of a TverskyGPT (shared), with their scalars, as a part of a total that has them in it.",
    )


def _papers(papers: dict[Setting, dict[str, Any]]) -> Table:
    columns = {
        "replaced": [paper["replaced"] for paper in papers.values()],
        "bank": [f"{paper['features']:,} x 768" for paper in papers.values()],
        "GPT-2": [f"{paper['gpt2']:,}" for paper in papers.values()],
        "Tversky": [f"{paper['tversky']:,}" for paper in papers.values()],
        "to GPT-2": [per_cent(paper["against_gpt2_percent"]) for paper in papers.values()],
        "the paper's": [f"{paper['paper_tversky_millions']:.2f} M" for paper in papers.values()],
    }
    return layout.make(
        columns,
        "The paper's totals",
        "As the totals of arXiv 2506.11035 for GPT-2 small can be read: one layer of width 768 in the place of each "
        "FFN, one bank for all layers and the head. What is saved are the FFNs.",
    )


def _findings(shapes: list[_Shape], papers: dict[Setting, dict[str, Any]]) -> list[str]:
    counts = [shape.counts for shape in shapes]
    larger = [f"{more(shared, dense):.1f}" for dense, shared, _ in counts]
    less = [more(shared, apart) for _, shared, apart in counts]
    d, inner = shapes[-1].config.n_embd, gpt2.d_ff(shapes[-1].config)
    features = papers["tied"]["features"]
    return [
        f"Every TverskyGPT is larger than the GPT-2 of its shape: by {', '.join(larger)} % where all layers share "
        "banks. Prototypes are as large as the linears that they stand for, and the banks come on top.",
        f"Sharing saves {-less[0]:.1f} to {-less[-1]:.1f} %, more in larger models, but only of a TverskyGPT with "
        "banks in every layer; against GPT-2 it saves nothing.",
        f"The paper's {per_cent(papers['tied']['against_gpt2_percent'])} is had by leaving out the FFNs. It is paid "
        f"in time: to measure {features:,} features takes {2 * features * d / 1e6:.1f} M operations a token and "
        f"layer, before anything is compared, and all of the FFN took {4 * d * inner / 1e6:.1f} M.",
    ]
