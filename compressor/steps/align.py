"""Steps 1 and 2: model and calibration text in, alignment.safetensors and alignment.json out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .. import alignment, artifacts, data, models
from ..alignment import Alignments
from ..errors import UserError
from ..models import OpenModel
from ..recipe import Align
from ..session import ANYWHERE, Columns, Session, lasting_specs, must_be_folder


def align(
    run: Path,
    model: str,
    source: str | Mapping[str, str],
    settings: Align,
    session: Session,
    *,
    n: int | None = None,
    anchor: str | int = "middle",
    columns: Columns = ANYWHERE,
) -> Alignments:
    """Write the alignment into the run folder. Several processes share the passes over the text."""
    run = Path(run)
    must_be_folder(run)
    if (run / "config.json").is_file():
        raise UserError(f"{run} is a model's folder; give another --run")
    if (run / "alignment.json").exists() and not session.force:
        raise UserError(f"{run} has an alignment already; give another --run, or --force to replace it")
    alignment.layer_pairs(models.find(model).config.n_layer, settings.pairs, n=n, anchor=anchor)  # before the work
    opened = session.open(model)
    _must_be_plain(opened)
    text = data.recipe_text(source, "calibration", text_column=columns.text_column, split=columns.split)
    config = opened.model.config
    blocks = data.token_blocks(
        text,
        opened.tokenizer,
        context=config.n_positions,
        max_tokens=settings.max_tokens,
        seed=session.seed,
        evenly=True,
    )
    facts = {
        **data.describe(text),
        "specs": lasting_specs(source),
        "named": data.specs(source),
        "tokens": blocks.tokens,
        "max_tokens": settings.max_tokens,
        "block_fingerprint": blocks.fingerprint,
        "text_column": columns.text_column,
        "split_given": columns.split,
    }
    if settings.method == "none":
        solved = alignment.identity(config)
    elif settings.method == "weight":
        solved = alignment.align_weights(opened.model, pairs=settings.pairs, n=n, anchor=anchor, seed=session.seed)
    else:
        own = session.processes
        with session.bar("align", -(-blocks.tokens // own.world)) as bar:
            solved = alignment.align_activations(
                opened.model,
                list(blocks.batches())[own.rank :: own.world] if own.world > 1 else blocks.batches(),
                site=settings.site,
                pairs=settings.pairs,
                n=n,
                anchor=anchor,
                seed=session.seed,
                progress=bar.update,
                all_sum=own.all_sum if own.world > 1 else None,
            )
    with session.alone() as here:
        if here:
            if run.is_dir():
                artifacts.sweep(run)
            with artifacts.new_files(run) as folder:
                alignment.save(folder, solved, session.origin(opened, {"calibration": facts}))
    return solved


def _must_be_plain(opened: OpenModel) -> None:
    if not opened.plain:
        raise UserError(
            f"{opened.name} is a compressed GPT-2 already; `gpt2-compress export {opened.name} --dense OUT` "
            "makes a plain one to start from"
        )
