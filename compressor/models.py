"""Open a MODEL, refuse in one line what is not a usable GPT-2, build one from a config, save one."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors
import torch
from transformers import AutoConfig, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from . import artifacts, demo
from .errors import UserError
from .modeling import GPT2CompressedConfig, GPT2CompressedLMHeadModel, register

register()

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
_FILE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
# Tensors that a GPT-2 checkpoint may hold besides the language model's: other heads, masks of old versions.
_OTHER_TENSORS = re.compile(
    r"(^|\.)attn\.(bias|masked_bias)$|^(score|classifier|qa_outputs|multiple_choice_head|v_head)\."
)
_HUB_FILES = ["*.json", "*.safetensors", "merges.txt", "vocab.json"]


@dataclass(frozen=True)
class OpenModel:
    """A language model ready to use, and where it came from."""

    name: str  # what the user named
    folder: Path
    hash: str  # sha256 over the weight files
    model: GPT2LMHeadModel
    tokenizer: PreTrainedTokenizerBase
    stored_dtype: torch.dtype  # of the checkpoint's files; what is derived from it is saved in the same

    @property
    def plain(self) -> bool:
        return type(self.model) is GPT2LMHeadModel


# ---------------------------------------------------------------- open


def locate(name: str) -> Path:
    """The folder of a MODEL: `demo`, a local folder, a run folder (its recovered/, else rewritten/) or a hub name."""
    if name == "demo":
        return demo.CHECKPOINT
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return folder
        for step in ("recovered", "rewritten"):
            if (folder / step / "config.json").is_file():
                return folder / step
        if (folder / "recipe.yaml").is_file() or (folder / "alignment.json").is_file():
            raise UserError(
                f"{name} is a run folder without a model yet; `gpt2-compress rewrite --run {name}` makes one"
            )
        raise UserError(
            f"{name} is a folder without config.json; allowed: a save_pretrained folder, a run folder, a hub name, demo"
        )
    if folder.exists():
        raise UserError(f"{name} is a file; allowed: a save_pretrained folder, a run folder, a hub name, demo")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"{name} does not exist; allowed: a save_pretrained folder, a run folder, a hub name, demo")
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name} is no local folder and could not be had from the hub ({type(error).__name__}: "
            f"{reason}); give a folder, or check the name, the network and HF_HUB_OFFLINE"
        ) from error


def read_config(name: str, folder: Path) -> GPT2Config:
    """The configuration of a GPT-2 checkpoint. Raises UserError for anything else."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: config.json cannot be read ({error})") from error
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind not in (GPT2Config.model_type, GPT2CompressedConfig.model_type):
        raise UserError(f"{name} is not a GPT-2: its model_type is {kind!r}; allowed: 'gpt2', 'gpt2_compressed'")
    known = set(GPT2Config().to_dict()) | set(GPT2Config.attribute_map)
    for key in raw:
        # transformers accepts such a key silently and builds another model than the file says
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
        if key not in known and close and close[0] not in raw:
            raise UserError(f"{name}: config.json has {key!r}, which GPT-2 does not know (did you mean {close[0]!r}?)")
    if raw.get("add_cross_attention"):
        raise UserError(f"{name} has cross-attention; only decoder-only GPT-2 language models can be compressed")
    if raw.get("quantization_config"):
        raise UserError(f"{name} is quantised; give the float checkpoint that it was made from")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, TypeError, OSError) as error:  # a wrong type in a known field
        raise UserError(
            f"{name}: config.json is not a valid GPT-2 configuration ({' '.join(str(error).split())})"
        ) from error


def weight_files(name: str, folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises UserError when there are none or a shard is missing."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise UserError(f"{name}: the weight file {missing[0]} named by {index.name} is missing")
        return [folder / shard for shard in shards]
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")) or list(folder.glob("*.ckpt")):
        raise UserError(
            f"{name} has its weights as pickle only, which can run code; save it as safetensors first "
            "(save_pretrained of transformers 5 does)"
        )
    raise UserError(f"{name} has no weights: neither model.safetensors nor model.safetensors.index.json")


def _read_header(name: str, files: list[Path]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Tensor name -> (shape, dtype) of weight files. Raises UserError for a damaged file."""
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


def _check_tensors(name: str, config: GPT2Config, header: dict[str, tuple[tuple[int, ...], str]]) -> None:
    """The file must hold exactly the language model of its config; transformers would fill gaps with random numbers."""
    expected = {key: tuple(tensor.shape) for key, tensor in build(config).state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    prefix = "transformer."
    given = {
        key if key.startswith((prefix, "lm_head.")) or _OTHER_TENSORS.search(key) else prefix + key: shape
        for key, (shape, _) in header.items()
    }
    for key, shape in expected.items():
        if key not in given:
            raise UserError(f"{name}: the weight files lack {key}, which its config asks for")
        if given[key] != shape:
            raise UserError(f"{name}: {key} has shape {list(given[key])}, its config asks for {list(shape)}")
    extra = [key for key in given if key not in expected and key != "lm_head.weight" and not _OTHER_TENSORS.search(key)]
    if extra:
        raise UserError(
            f"{name}: the weight files hold {extra[0]}, which a GPT-2 of this config does not have "
            "(merge adapters, or export --dense, before compressing)"
        )


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
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: its tokenizer cannot be read ({' '.join(str(error).split())[:200]})") from error
    if not 1 < len(tokenizer) <= config.vocab_size:
        raise UserError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}; "
            "they do not belong together"
        )
    return tokenizer


def parse_dtype(dtype: str | None) -> torch.dtype:
    """The dtype to compute in: float32 unless named, also for float16 and bfloat16 files."""
    if dtype is None:
        return torch.float32
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    return DTYPES[dtype]


def parse_device(device: str | None) -> torch.device:
    """The device to compute on: a GPU when there is one, unless named."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        parsed = torch.device(device)
        torch.empty(0, device=parsed)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used here ({str(error).splitlines()[0]})") from error
    return parsed


def open_model(name: str, *, device: str | None = None, dtype: str | None = None) -> OpenModel:
    """Open a MODEL for computing in float32 (unless `dtype`), in evaluation mode. Never runs code of the checkpoint."""
    compute, target = parse_dtype(dtype), parse_device(device)
    folder = locate(name)
    config = read_config(name, folder)
    files = weight_files(name, folder)
    header = _read_header(name, files)
    _check_tensors(name, config, header)
    tokenizer = open_tokenizer(name, folder, config)
    model_class = GPT2CompressedLMHeadModel if isinstance(config, GPT2CompressedConfig) else GPT2LMHeadModel
    model = model_class.from_pretrained(
        folder, config=config, dtype=compute, use_safetensors=True, local_files_only=True
    )
    for key, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(f"{name}: {key} holds NaN or infinite numbers; this checkpoint is broken")
    model.to(target)  # type: ignore[arg-type]
    return OpenModel(name, folder, artifacts.hash_files(files), model.eval(), tokenizer, _dtype_of(header))


def stored_dtype(name: str, files: list[Path]) -> torch.dtype:
    """The dtype of a checkpoint's weight files."""
    return _dtype_of(_read_header(name, files))


def _dtype_of(header: dict[str, tuple[tuple[int, ...], str]]) -> torch.dtype:
    return next(
        _FILE_DTYPES.get(kind, torch.float32) for key, (_, kind) in header.items() if key.endswith("wte.weight")
    )


# ---------------------------------------------------------------- build and save


def build(config: GPT2Config) -> GPT2LMHeadModel:
    """The language model of a config on the meta device: structure without weights."""
    model_class = GPT2CompressedLMHeadModel if isinstance(config, GPT2CompressedConfig) else GPT2LMHeadModel
    with torch.device("meta"):
        return model_class(config)  # type: ignore[arg-type]


def save(model: GPT2LMHeadModel, folder: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> None:
    """Write a save_pretrained folder: safetensors in `dtype`, config, generation config, tokenizer, modeling files."""
    model.to(dtype).save_pretrained(folder)  # type: ignore[arg-type]
    tokenizer.model_max_length = model.config.n_positions  # transformers does not infer it
    tokenizer.save_pretrained(folder)


def probe(model: GPT2LMHeadModel) -> dict[str, Any]:
    """A short fixed input and some of the logits it gives: lets a fresh process prove that it opened this model."""
    vocabulary, length = model.config.vocab_size, min(24, model.config.n_positions)
    ids = [(7919 * i + 13) % vocabulary for i in range(length)]
    tokens = [(104729 * i) % vocabulary for i in range(16)]
    device = next(model.parameters()).device
    with torch.no_grad():
        logits = model(torch.tensor([ids], device=device)).logits[0].float()
    return {
        "ids": ids,
        "tokens": tokens,
        "logits": logits[-1, tokens].tolist(),
        "logsumexp": logits.logsumexp(-1).tolist(),
    }
