"""What lies on disk: tensors in .safetensors, facts in a .json of the same stem, written atomically, never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import transformers
from torch import Tensor

from .errors import UserError

SCHEMA = 1
_UNFINISHED = ".gpt2-compress-partial-"  # prefix of what is being written; swept at the next start
_REPLACED = ".gpt2-compress-replaced-"  # prefix of what is being replaced, until its successor is in place


@dataclass(frozen=True)
class Provenance:
    """Where a number or a file comes from; stands in every JSON that this package writes."""

    version: str
    commit: str | None
    command: str
    seed: int
    base_model: str
    base_hash: str
    data: dict[str, Any] = field(default_factory=dict)  # part -> {"source", "fingerprint", "tokens"}
    torch: str = torch.__version__
    transformers: str = transformers.__version__
    device: str = "cpu"
    threads: int = 1
    dtype: str = "float32"


def provenance(
    *, seed: int, base_model: str, base_hash: str, device: str, dtype: str, data: Mapping[str, Any] | None = None
) -> Provenance:
    """The provenance of what this process makes now."""
    from . import __version__

    return Provenance(
        version=__version__,
        commit=_commit(),
        command=command_line(),
        seed=seed,
        base_model=base_model,
        base_hash=base_hash,
        data=dict(data or {}),
        device=device,
        threads=torch.get_num_threads(),
        dtype=dtype,
    )


def command_line() -> str:
    """What this process was started with, quoted as a shell needs it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _commit() -> str | None:
    """The commit of the source tree this package runs from; None for an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    answer = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return answer.stdout.strip() or None if answer.returncode == 0 else None


# ---------------------------------------------------------------- atomic writes


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """A full disk or a read-only folder is the user's to mend: one line."""
    try:
        yield
    except OSError as error:
        raise _refused(path, error.strerror or error) from error
    except safetensors.SafetensorError as error:  # what a full disk looks like from safetensors
        raise _refused(path, error) from error
    except Exception as error:  # and from tokenizers, which raises Exception itself
        if type(error) is not Exception or "(os error" not in str(error):
            raise
        raise _refused(path, error) from error


def _refused(path: Path, reason: object) -> UserError:
    final = Path(*(part for part in Path(path).parts if not part.startswith(_UNFINISHED)))
    return UserError(f"cannot write {final}: {reason}; what was there before is as it was")


@contextmanager
def _parents(path: Path) -> Iterator[None]:
    """The folders above `path` exist; those that had to be made go again when what follows fails."""
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in missing:  # innermost first
            with suppress(OSError):  # another process may use it by now
                folder.rmdir()
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, fsync it, rename it to `path`."""
    path = Path(path)
    temporary = path.with_name(_UNFINISHED + path.name)
    with _disk_errors(path), _parents(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, kind: str, body: Mapping[str, Any], origin: Provenance) -> None:
    """Write `body` with its kind, schema version and provenance."""
    document = {"kind": kind, "schema": SCHEMA, **body, "provenance": asdict(origin)}
    write_bytes(path, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, kind: str, made_by: str) -> dict[str, Any]:
    """Read what `write_json` wrote. Raises UserError for a missing file, another kind or another schema."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; `gpt2-compress {made_by}` makes it")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not readable JSON ({error}); make it anew with `gpt2-compress {made_by}`"
        ) from error
    if not isinstance(document, dict) or document.get("kind") != kind or document.get("schema") != SCHEMA:
        given = (
            (document.get("kind"), document.get("schema")) if isinstance(document, dict) else type(document).__name__
        )
        raise UserError(
            f"{path} is {given}, expected ({kind!r}, {SCHEMA}); make it anew with `gpt2-compress {made_by}`"
        )
    return document


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a .safetensors file, atomically."""
    path = Path(path)
    temporary = path.with_name(_UNFINISHED + path.name)
    contiguous = {name: tensor.detach().contiguous().cpu() for name, tensor in sorted(tensors.items())}
    with _disk_errors(path), _parents(path):
        try:
            safetensors.torch.save_file(contiguous, temporary, metadata={"format": "pt"})
            _fsync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def read_tensors(path: Path, made_by: str) -> dict[str, Tensor]:
    """Read a .safetensors file. Raises UserError when it is missing or damaged."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; `gpt2-compress {made_by}` makes it")
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); make it anew with `gpt2-compress {made_by}`") from error


@contextmanager
def new_folder(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well; else nothing has changed.

    Raises UserError when `path` exists and not `force`, or when the disk refuses.
    """
    path = Path(os.path.abspath(path))  # "." has no name to put a prefix before
    if path.exists() and not force:
        raise UserError(f"{path} exists already; give another folder or --force to replace it")
    temporary = path.with_name(_UNFINISHED + path.name)
    with _disk_errors(path), _parents(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _fsync(file)
            _take_place(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _take_place(new: Path, path: Path) -> None:
    """Rename `new` to `path`; what is there goes only when its successor is in place."""
    old = path.with_name(_REPLACED + path.name)
    remove(old)
    if os.path.lexists(path):
        os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        if os.path.lexists(old):
            os.replace(old, path)
        raise
    _fsync(path.parent)
    with suppress(OSError):  # the next start sweeps it
        remove(old)


@contextmanager
def new_files(folder: Path, *, instead_of: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder whose files go into `folder` together, over what is there, when the block ends well; else
    nothing has changed. instead_of: files that go where the block has not written them anew. Raises UserError when the
    disk refuses."""
    folder = Path(os.path.abspath(folder))
    temporary = folder / (_UNFINISHED + "files")
    with _disk_errors(folder), _parents(temporary):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            files = sorted(temporary.iterdir())
            for file in files:
                if (folder / file.name).is_dir():
                    raise UserError(f"cannot write {folder / file.name}: there is a folder of that name")
            facts = [file for file in files if file.suffix == ".json"]  # come last: a kill before leaves the old ones
            for file in files:
                if file not in facts:
                    os.replace(file, folder / file.name)
            for name in set(instead_of) - {file.name for file in files}:
                (folder / name).unlink(missing_ok=True)
            for file in facts:
                os.replace(file, folder / file.name)
            _fsync(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there; a folder as a whole: a kill leaves no half of it."""
    with _disk_errors(path):
        if path.is_dir() and not path.is_symlink():
            doomed = path
            if not path.name.startswith((_UNFINISHED, _REPLACED)):  # which the next start sweeps
                doomed = path.with_name(_UNFINISHED + path.name)
                shutil.rmtree(doomed, ignore_errors=True)
                os.replace(path, doomed)
            shutil.rmtree(doomed)
        else:
            path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove what a killed step left unfinished in `folder`, and put back what it was about to replace."""
    folder = Path(folder)
    with _disk_errors(folder):
        for stale in folder.glob(_REPLACED + "*"):
            place = folder / stale.name.removeprefix(_REPLACED)
            if os.path.lexists(place):
                remove(stale)
            else:
                os.replace(stale, place)
        for stale in folder.glob(_UNFINISHED + "*"):
            remove(stale)


# ---------------------------------------------------------------- fingerprints


def hash_files(paths: list[Path]) -> str:
    """sha256 over the contents of files, in name order."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        with open(path, "rb") as file:
            digest.update(
                hashlib.file_digest(file, "sha256").digest()
                if hasattr(hashlib, "file_digest")
                else hashlib.sha256(file.read()).digest()
            )
    return digest.hexdigest()
