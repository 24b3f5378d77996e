"""Show that a model is what it says (`verify`), and fold it to plain GPT-2 (`export`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .. import artifacts, models, verify
from ..errors import UserError
from ..metrics.flops import flops_per_token
from ..metrics.size import parameters, weight_bytes
from ..rewrites import from_record
from ..session import Session, may_be_replaced


def verify_model(path: str, session: Session) -> list[verify.Check]:
    """Reopen a model in a fresh process and compare."""
    if models.parse_dtype(session.dtype) != torch.float32:
        raise UserError(f"verify computes in float32, in both processes; --dtype {session.dtype} is not allowed")
    return verify.verify(session.open(path), trust=session.force)


def export(path: str, out: Path, session: Session) -> dict[str, Any]:
    """Fold a model to dense plain GPT-2 and save it. Replaces a model's folder only, whatever `session.force` says."""
    out = Path(out)
    may_be_replaced(out, session.force)
    opened = session.open(path)
    model = opened.model
    for record in getattr(model.config, "compression", None) or []:
        model = from_record(record).fold(model) or model
    if model.config.model_type != "gpt2":
        raise UserError(f"{path} cannot be expressed as plain GPT-2")
    with artifacts.new_folder(out, force=session.force) as folder:
        models.save(model, folder, opened.tokenizer, opened.stored_dtype)
        size = weight_bytes(folder)
    return {
        "path": str(out),
        "layers": model.config.n_layer,
        "parameters": parameters(model),
        "parameters_before": parameters(opened.model),
        "bytes": size,
        "flops_per_token": flops_per_token(model),
    }
