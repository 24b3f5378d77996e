"""A GPT-2 on disk: found by name and refused in one line where it is not usable, before any weight is read."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import safetensors
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from . import demo
from .checkpoint_config import read_config
from .errors import UserError
from .modeling import GPT2CompressedConfig, GPT2CompressedLMHeadModel
from .modeling.tversky import FORM
from .modeling.tversky_layers import tversky_places

FILE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
ALLOWED = "a save_pretrained folder, a run folder, a hub name, demo"
# Tensors that a GPT-2 checkpoint may hold besides the language model's: other heads, masks of old versions.
_OTHER_TENSORS = re.compile(
    r"(^|\.)attn\.(bias|masked_bias)$|^(score|classifier|qa_outputs|multiple_choice_head|v_head)\."
)
_PREFIX = GPT2LMHeadModel.base_model_prefix + "."
((_HEAD, _EMBEDDING),) = GPT2LMHeadModel._tied_weights_keys.items()
_FEATURES = re.compile(r"(\.feature_bank\.)([^.]+)\.")
_INDEX = "model.safetensors.index.json"
_HUB_FILES = ["*.json", "model.safetensors", "model-*.safetensors", "merges.txt", "*.py"]

Header = dict[str, tuple[tuple[int, ...], str]]  # tensor name -> (shape, dtype as safetensors spells it)


@dataclass(frozen=True)
class Checkpoint:
    """A GPT-2 on disk whose config and tensor shapes were found to fit; its weights are unread."""

    name: str  # what the user named
    folder: Path
    config: GPT2Config
    files: tuple[Path, ...]  # the weight files
    header: Header

    @property
    def dtype(self) -> torch.dtype:
        """Of the token embeddings, which stands for all."""
        return FILE_DTYPES[self.header.get(_EMBEDDING, self.header.get(_EMBEDDING.removeprefix(_PREFIX)))[1]]  # type: ignore[index]

    @property
    def bytes(self) -> int:
        """Of the weight files."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def foreign_bytes(self) -> int:
        """Of tensors in the weight files that are none of the language model's parameters."""
        wanted = build(self.config).state_dict()
        tied = {_HEAD} if self.config.tie_word_embeddings else set()
        return sum(
            torch.Size(shape).numel() * _itemsize(kind)
            for key, (shape, kind) in self.header.items()
            if (place := _place(key)) not in wanted or place in tied
        )


def find(name: str) -> Checkpoint:
    """The checkpoint of a MODEL. Raises UserError for what is not there, no GPT-2, damaged or inconsistent."""
    folder = locate(name)
    config = read_config(name, folder)
    files = weight_files(name, folder)
    header = _read_header(name, files)
    _check_tensors(name, config, header)
    return Checkpoint(name, folder, config, tuple(files), header)


def build(config: GPT2Config) -> GPT2LMHeadModel:
    """The language model of a config on the meta device: structure without weights."""
    model_class = GPT2CompressedLMHeadModel if isinstance(config, GPT2CompressedConfig) else GPT2LMHeadModel
    with torch.device("meta"):
        return model_class(config)  # type: ignore[arg-type]


def structure_hash(config: GPT2Config) -> str:
    """The same for two models exactly when they hold the same tensors, shared by the same layers and compared in the
    same form; how banks of features are called is no matter."""
    places = dict(sorted(tversky_places(config).items(), key=str))
    numbers = {key: number for number, key in enumerate(dict.fromkeys(place.key for place in places.values()))}

    def named(key: str) -> str:
        return _FEATURES.sub(lambda found: f"{found[1]}{numbers[found[2]]}.", key)

    shapes = sorted((named(key), list(tensor.shape)) for key, tensor in build(config).state_dict().items())
    uses = [
        [layer, target, numbers[place.key], *(place.entry[name] for name in FORM)]
        for (layer, target), place in places.items()
    ]
    attention = [[*entry.items()] for entry in getattr(config, "efficient_attention", None) or []]
    told = [shapes, shared_layers(config), uses, *([sorted(map(sorted, attention))] if attention else [])]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


def shared_layers(config: GPT2Config) -> list[list[int]]:
    """The layers of each group that shares an FFN, then those of each bank of features."""
    banks: dict[str, list[int]] = {}
    for (layer, _), place in tversky_places(config).items():
        banks.setdefault(place.key, []).extend([] if layer is None else [layer])
    ffns = [entry["layers"] for entry in getattr(config, "ffn_groups", None) or []]
    return [*ffns, *(sorted(set(layers)) for layers in banks.values())]


# ---------------------------------------------------------------- where


def locate(name: str) -> Path:
    """The folder of a MODEL: `demo`, a local folder, a run folder (its recovered/, else rewritten/) or a hub name."""
    if name == "demo":
        return demo.CHECKPOINT
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if (folder / "config.json").is_file():
            return folder
        for step in ("recovered", "rewritten"):
            if (folder / step / "config.json").is_file():
                return folder / step
        if (folder / "recipe.yaml").is_file() or (folder / "alignment.json").is_file():
            raise UserError(
                f"{name} is a run folder without a model yet; `gpt2-compress rewrite --run {name}` makes one"
            )
        raise UserError(f"{name} is a folder without config.json; allowed: {ALLOWED}")
    if name and folder.exists():
        raise UserError(f"{name} is a file; allowed: {ALLOWED}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"{name or repr(name)} does not exist; allowed: {ALLOWED}")
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name} is no local folder and could not be had from the hub ({type(error).__name__}: "
            f"{reason}); give a folder, or check the name, the network and HF_HUB_OFFLINE"
        ) from error


# ---------------------------------------------------------------- weights


def weight_files(name: str, folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises UserError when there are none or a shard is missing."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if (folder / _INDEX).is_file():
        try:
            shards = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
            missing = [shard for shard in shards if not (folder / shard).is_file()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{name}: {_INDEX} cannot be read ({error!r}); fetch or copy it again") from error
        if missing or not shards:
            raise UserError(f"{name}: the weight file {missing[0] if missing else ''} named by {_INDEX} is missing")
        return [folder / shard for shard in shards]
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")) or list(folder.glob("*.ckpt")):
        raise UserError(
            f"{name} has its weights as pickle only, which can run code; save it as safetensors first "
            "(save_pretrained of transformers 5 does)"
        )
    raise UserError(f"{name} has no weights: neither model.safetensors nor {_INDEX} (pickle files are not taken)")


def _read_header(name: str, files: list[Path]) -> Header:
    """Names, shapes and dtypes of the tensors in weight files. Raises UserError for a damaged file."""
    header = {}
    for file in files:
        try:
            with safetensors.safe_open(file, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118 (not a dict)
                    entry = handle.get_slice(key)
                    header[key] = (tuple(entry.get_shape()), entry.get_dtype())
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{name}: {file.name} is damaged or truncated ({error}); fetch or copy it again") from error
    return header


def _place(key: str) -> str:
    """The language model's name of a checkpoint's tensor; a base model's file leaves out the trunk's prefix."""
    own = key.startswith((_PREFIX, _HEAD.removesuffix("weight"), "head_map."))  # a head may have more than its weight
    return key if own or _OTHER_TENSORS.search(key) else _PREFIX + key


def _itemsize(kind: str) -> int:
    if kind == "BOOL":
        return 1
    return -(-int("".join(filter(str.isdigit, kind.split("_")[0]))) // 8)


def _check_tensors(name: str, config: GPT2Config, header: Header) -> None:
    """The file must hold exactly the language model of its config; transformers would fill gaps with random numbers."""
    expected = {key: tuple(tensor.shape) for key, tensor in build(config).state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop(_HEAD)
    given = {_place(key): entry for key, entry in header.items()}
    for key, shape in expected.items():
        if key not in given:
            raise UserError(f"{name}: the weight files lack {key}, which its config asks for")
        if given[key][0] != shape:
            raise UserError(f"{name}: {key} has shape {list(given[key][0])}, its config asks for {list(shape)}")
        if given[key][1] not in FILE_DTYPES:
            raise UserError(f"{name}: {key} is stored as {given[key][1]}; allowed: {', '.join(FILE_DTYPES)}")
    extra = [key for key in given if key not in expected and key != _HEAD and not _OTHER_TENSORS.search(key)]
    if extra:
        raise UserError(
            f"{name}: the weight files hold {extra[0]}, which a GPT-2 of this config does not have "
            "(merge adapters, or export --dense, before compressing)"
        )


# ---------------------------------------------------------------- tokenizer


def open_tokenizer(name: str, folder: Path, config: GPT2Config) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint. Raises UserError when its files are missing or do not fit the model."""
    if not (folder / "tokenizer.json").is_file() and not (
        (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    ):
        # AutoTokenizer would load an empty tokenizer without a word
        raise UserError(
            f"{name} has no tokenizer (tokenizer.json, or vocab.json and merges.txt); "
            "save the model's tokenizer into its folder"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises Exception itself; a bug elsewhere passes through
        if type(error) is not Exception and not isinstance(error, OSError | ValueError | KeyError | TypeError):
            raise
        raise UserError(f"{name}: its tokenizer cannot be read ({' '.join(str(error).split())[:200]})") from error
    if not 1 < len(tokenizer) <= config.vocab_size:
        raise UserError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}; "
            "they do not belong together"
        )
    return tokenizer
