"""What a command prints: results as lines of text."""

from __future__ import annotations

import math
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
            f"cache            {_change(body['cache_bytes_before'], body['cache_bytes'])}",
            *(_slice_lines(body) if body["slices"] else []),
            f"time to make     about {body['seconds_to_make']:.0f} s here",
            *([f"note             {note}"] if (note := _twins(body)) else []),
            *(
                ["note             the search chooses the window; this one stands for it"]
                if any(body["searched"])
                else []
            ),
            *(["note             calibration text will choose which layers go"] if any(body["calibrated"]) else []),
        ]
    )


def _slice_lines(body: dict[str, Any]) -> list[str]:
    """The smaller models of a plan, against the model before."""
    width = max(len(row["slice"]) for row in body["slices"])

    def figure(row: dict[str, Any], key: str, word: str) -> str:
        return f"{row[key]:,} {word} ({row[key] / body[f'{key}_before'] - 1:+.1%})"

    return [
        f"slice            {row['slice']:{width}}  {row['layers']} layers, {figure(row, 'parameters', 'parameters')}, "
        f"{figure(row, 'flops_per_token', 'FLOPs per token')}, {row['model_type']}"
        for row in body["slices"]
    ]


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
            f"cache            {_change(body['cache_bytes_before'], body['cache_bytes'])}",
        ]
    )


def cut(folder: str, body: dict[str, Any]) -> str:
    """What was cut out, and of a budget what was measured."""
    return "\n".join(
        [
            *(_measured(body["plan"]) if "plan" in body else []),
            f"{folder}: {body['slice']}",
            f"layers           {body['layers_whole']} -> {body['layers']}",
            f"parameters       {_change(body['parameters_whole'], body['parameters'])}",
            f"bytes            {_change(body['bytes_whole'], body['bytes'])}",
            f"FLOPs per token  {_change(body['flops_per_token_whole'], body['flops_per_token'])}",
            f"cache            {_change(body['cache_bytes_whole'], body['cache_bytes'])}",
        ]
    )


def _measured(plan: dict[str, Any]) -> list[str]:
    """The slices that were measured for a budget, the largest first."""
    on, rows = plan["perplexity_of"], plan["candidates"]
    whole = next(row["perplexity"] for row in rows if row["slice"] == "whole")
    width, timed = max(len(row["slice"]) for row in rows), any(row["latency"] is not None for row in rows)
    lines = []
    for row in rows:
        score, time = row["perplexity"], row["latency"]
        against = "" if score is None or whole is None else f"{score / whole - 1:+.1%}"
        told = "  taken" if row["picked"] else "" if row["within"] else "  over the budget"
        lines.append(
            f"{row['slice']:{width}} {'*' if row['front'] else ' '} {row['parameters']:13,}  "
            + (f"{'' if time is None else f'{time:.3f}':>10}  " if timed else "")
            + f"{'-' if score is None else f'{score:.2f}':>10}  {against:>13}{told}"
        )
    return [
        f"perplexity on {on['tokens']:,} tokens of {on['source']}, {on['part']} data; sizes looked at: "
        f"{plan['looked_at']}; * no other is better in all:",
        "",
        f"{'slice':{width}}   {'parameters':>13}  {'time/whole  ' if timed else ''}perplexity  against whole",
        *lines,
        "",
    ]


def model(body: dict[str, Any]) -> str:
    """What a model is, as lines of text."""
    from .report import tversky  # not with --help: it loads torch

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
            "cache_bytes",
        )
    ]
    if body["longest"] is None:
        lines.append("takes            any number of tokens; context is the length that it was trained at")
    for record in body["compression"]:
        settings = ", ".join(f"{key}={value}" for key, value in record.items() if key != "rewrite")
        lines.append(f"made by          {record.get('rewrite')}: {settings}")
    for index, group in enumerate(body["ffn_groups"]):
        lines.append(f"shared FFN {index}     layers {group['layers']}, rank {group['rank']}, bias {group['bias']}")
    lines += [_bank(bank) for bank in body["feature_banks"]]
    found = tversky.diagnosis(body, "", body["path"])
    lines += [f"diagnosis        {line}" for line in (tversky.summary(found) if found else ())]
    for row in body.get("alignment", []):
        lines.append(
            f"alignment        {row['layer']} -> {row['anchor']}: matched {row['matched']:.3f}, identity "
            f"{row['identity']:.3f}"
        )
    return "\n".join(lines)


def _bank(bank: dict[str, Any]) -> str:
    from .report import tversky  # not with --help: it loads torch

    layers: dict[str, list[int]] = {}
    for layer, target in bank["projections"]:
        layers.setdefault(target, []).extend([] if layer is None else [layer])
    users = ", ".join(target + (f" of {tversky.layers_named(own)}" if own else "") for target, own in layers.items())
    twice = " and their opposites" if bank["antipodal"] else ""
    return (
        f"feature bank     {bank['key']}: {bank['features']:,} features{twice} of width {bank['width']:,} for {users}"
    )


def checks(rows: list[dict[str, Any]]) -> str:
    """What was verified."""
    return "\n".join(f"{'ok  ' if row['passed'] else 'FAIL'}  {row['name']}: {row['detail']}" for row in rows)


def export(body: dict[str, Any]) -> str:
    """What was exported."""
    return (
        f"{body['path']}: plain GPT-2, {body['layers']} layers, {body['parameters']:,} parameters, "
        f"{body['bytes']:,} bytes"
    )


def windows(run: str, body: dict[str, Any]) -> str:
    """The windows that were scored, the best first, and how sure that is."""
    rows = sorted(
        body["candidates"], key=lambda row: (row["windows"] != body["winner"], _far(row["behind"]), _far(row["nll"]))
    )
    lines = [
        f"{body['scored']['rewrite']['rewrite']} on {sum(body['block_tokens']):,} tokens of selection text; behind: "
        "paired on the same blocks, +- a standard error:",
        "",
        "layers              perplexity  behind",
    ]
    for row in rows:
        score = "-" if row["perplexity"] is None else f"{row['perplexity']:.2f}"
        lines.append(f"{_plan_name(row['windows']):18}  {score:>10}  {_behind(row, body['winner'])}")
    if body.get("original"):
        whole = body["original"]["perplexity"]
        lines.append(f"{'the original':18}  {'-' if whole is None else f'{whole:.2f}':>10}")
    near = [_plan_name(row["windows"]) for row in body["candidates"] if row["indistinguishable"] and row["windows"]]
    lines.append("")
    lines.append(f"{run}/windows.json: best is {_plan_name(body['winner'])}")
    if near:
        lines.append(f"not to be told from it on this text: {'; '.join(near)}")
    return "\n".join(lines)


def _behind(row: dict[str, Any], winner: list[dict[str, Any]] | None) -> str:
    """How far a window is behind the best, as a change of perplexity."""
    if row["windows"] == winner:
        return "best"
    if not row["windows"] or row["behind"] is None or row["behind"] > 5:
        return "" if not row["windows"] else "far"
    error = "" if row["error"] is None else f" +- {math.expm1(row['error']):.2%}"
    note = "  within the noise" if row["indistinguishable"] else ""
    dropped = f"  dropped after {row['blocks']} blocks" if row["dropped"] else ""
    return f"{math.expm1(row['behind']):+.2%}{error}{note}{dropped}"


def _far(value: float | None) -> float:
    return math.inf if value is None else value


def _plan_name(plan: list[dict[str, Any]]) -> str:
    return " + ".join(f"{item['start']}-{item['start'] + item['n'] - 1}" for item in plan) or "the original"


def recovery(run: str, bodies: dict[str, dict[str, Any]]) -> str:
    """What a recovery did to each model."""
    lines = []
    for name, body in bodies.items():
        done = body["recovery"]
        before, after = (
            "beyond numbers" if score is None else f"{score:.2f}"
            for score in (body["selection_perplexity"][when] for when in ("before", "after"))
        )
        rate = done["tokens"] / done["training_seconds"] if done["training_seconds"] else math.nan
        lines.append(
            f"{run}/{name}: {done['train']}, {done['trainable']:,} parameters, {done['steps']} steps, best at "
            f"{done['best_step']}; selection perplexity {before} -> {after}; "
            f"{rate:,.0f} tokens/s"
        )
    return "\n".join(lines)


def written(folder: str) -> str:
    """Where a report is."""
    return f"written to {folder}: report.html with the plots, report.md, report.json"


def run(folder: str, rows: list[str]) -> str:
    """Where to go from a finished run."""
    model = f"{folder}/{'recovered' if 'recovered' in rows else 'rewritten'}"
    return (
        f"{model} opens with from_pretrained; `gpt2-compress verify {folder}` proves it; {folder}/report.html has the "
        "tables and the plots"
    )
