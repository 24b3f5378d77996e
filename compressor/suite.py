"""What a benchmark measures, by name: the .yaml files in benchmarks/suites/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .benchmark import check_metrics
from .errors import UserError, unknown
from .recipe import parse_yaml

# Installed as the folder compressor/suites; in a source tree they lie where people look for them.
_SUITE_FOLDERS = (Path(__file__).parent / "suites", Path(__file__).parent.parent / "benchmarks" / "suites")


def names() -> list[str]:
    """The short names of the suites that come with the package."""
    return sorted({file.stem for folder in _SUITE_FOLDERS for file in folder.glob("*.yaml")})


def load(name_or_path: str | Path) -> dict[str, Any]:
    """A suite by short name or from a .yaml file: {"description": text, "metrics": [{"metric": name, **settings}]}.

    Raises UserError for an unknown suite, key, metric or setting.
    """
    named = [folder / f"{name_or_path}.yaml" for folder in _SUITE_FOLDERS]
    path = next((file for file in [*named, Path(name_or_path)] if file.is_file()), None)
    if path is None:
        raise unknown("suite", str(name_or_path), [*names(), "FILE.yaml"])
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), f"suite {path}")
    except UnicodeDecodeError as error:
        raise UserError(f"suite {path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or "metrics" not in content:
        raise UserError(f"suite {path} has no list of metrics; expected `metrics: [...]`")
    for key in content:
        if key not in ("description", "metrics"):
            raise unknown(f"key of suite {path}", str(key), ["description", "metrics"])
    chosen = check_metrics(content["metrics"])
    return {
        "description": str(content.get("description", "")).strip(),
        "metrics": [{"metric": metric, **settings} for metric, settings in chosen],
    }
