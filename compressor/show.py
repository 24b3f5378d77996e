"""What a command prints: results as lines of text."""

from __future__ import annotations

from typing import Any


def _change(before: float, after: float) -> str:
    return f"{before:,} -> {after:,} ({after / before - 1:+.1%})"


def plan(body: dict[str, Any]) -> str:
    """The plan as lines of text."""
    groups = [
        f"{group['rewrite']}: layers {group['layers'][0]}-{group['layers'][-1]}, anchor {group['anchor']}"
        for group in body["windows"]
    ]
    return "\n".join(
        [
            f"model            {body['model']} -> {body['model_type']}",
            *(f"window           {group}" for group in groups),
            f"layers           {body['layers_before']} -> {body['layers']}",
            f"parameters       {_change(body['parameters_before'], body['parameters'])}",
            f"bytes            {_change(body['bytes_before'], body['bytes'])}",
            f"FLOPs per token  {_change(body['flops_per_token_before'], body['flops_per_token'])}",
            f"time to make     about {body['seconds_to_make']:.0f} s here",
            *([f"note             {note}"] if (note := _twins(body)) else []),
        ]
    )


def _twins(body: dict[str, Any]) -> str:
    if body["structure"] == body["structure_before"]:
        return "the same structure as before: no smaller and no faster"
    if body["same_structure_as"]:
        return f"{', '.join(body['same_structure_as'])} would give the same structure"
    return ""


def alignment(run: str, method: str, tokens: int, rows: list[dict[str, Any]]) -> str:
    """How well each pair of layers matches."""
    what = "correlation" if method == "activation" else "cosine"
    lines = [
        f"{method} alignment of {tokens:,} tokens in {run}; mean {what} of matched neurons:",
        "",
        "layer -> anchor   matched  identity  random  dead",
    ]
    lines += [
        f"{row['layer']:5d} -> {row['anchor']:<6d}   {row['matched']:7.3f}  {row['identity']:8.3f}  "
        f"{row['random']:6.3f}  {row['dead_anchor'] + row['dead_layer']:4d}"
        for row in rows
    ]
    return "\n".join(lines) if rows else f"no alignment (method none) in {run}: every neuron stays where it is"


def rewrite(folder: str, body: dict[str, Any]) -> str:
    """What a rewrite did to the model's size."""
    return "\n".join(
        [
            f"{folder}: {', '.join(str(item['rewrite']) for item in body['rewrites'])}",
            f"layers           {body['layers_before']} -> {body['layers']}",
            f"parameters       {_change(body['parameters_before'], body['parameters'])}",
            f"bytes            {_change(body['bytes_before'], body['bytes'])}",
            f"FLOPs per token  {_change(body['flops_per_token_before'], body['flops_per_token'])}",
        ]
    )


def model(body: dict[str, Any]) -> str:
    """What a model is, as lines of text."""
    lines = [
        f"{key:16} {body[key]:,}" if isinstance(body[key], int) else f"{key:16} {body[key]}"
        for key in (
            "folder",
            "model_type",
            "layers",
            "width",
            "heads",
            "context",
            "vocabulary",
            "parameters",
            "parameters_before",
            "dtype",
            "bytes",
            "flops_per_token",
        )
    ]
    for record in body["compression"]:
        settings = ", ".join(f"{key}={value}" for key, value in record.items() if key != "rewrite")
        lines.append(f"made by          {record.get('rewrite')}: {settings}")
    for index, group in enumerate(body["ffn_groups"]):
        lines.append(f"shared FFN {index}     layers {group['layers']}, rank {group['rank']}, bias {group['bias']}")
    for row in body.get("alignment", []):
        lines.append(
            f"alignment        {row['layer']} -> {row['anchor']}: matched {row['matched']:.3f}, identity "
            f"{row['identity']:.3f}"
        )
    return "\n".join(lines)


def checks(rows: list[dict[str, Any]]) -> str:
    """What was verified."""
    return "\n".join(f"{'ok  ' if row['passed'] else 'FAIL'}  {row['name']}: {row['detail']}" for row in rows)


def export(body: dict[str, Any]) -> str:
    """What was exported."""
    return (
        f"{body['path']}: plain GPT-2, {body['layers']} layers, {body['parameters']:,} parameters, "
        f"{body['bytes']:,} bytes"
    )


def demo(run: str) -> str:
    """Where to go from a finished demo."""
    return (
        f"{run}/rewritten opens with from_pretrained; `gpt2-compress verify {run}` proves it; {run}/report.md has the "
        "table"
    )
