"""Runs in a fresh process, without this package: open a saved model as a stranger would and say what it does.

Arguments: the model's folder, a sentence. Prints one JSON object. Imports torch and transformers only.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

_WEIGHTS = ("*.bin", "*.pt", "*.pkl", "*.pth", "*.ckpt")


def main(folder: str, sentence: str) -> dict:
    # a plain GPT-2 needs no code of its own: if one asks for it, it is not run
    custom = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["model_type"] != "gpt2"
    trust = {"trust_remote_code": custom}
    opened: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **trust)
    model, loading = opened
    model.eval()
    config = model.config
    blocks = [entry["block"] for entry in getattr(config, "efficient_attention", None) or []]
    length = min(max([24, *(2 * block + 8 for block in blocks)]), config.n_positions)  # as models.probe's
    alibi = getattr(config, "alibi", None)
    endless = alibi is not None and not alibi["learned_positions"]
    if endless:
        length = config.n_positions + 8
    ids = torch.tensor(
        [
            [(7919 * i + 13) % config.vocab_size for i in range(length)],
            [(6367 * i + 5) % config.vocab_size for i in range(length)],
        ]
    )
    with torch.no_grad():
        full = model(ids).logits
        half = length // 2
        first = model(ids[:, :half], use_cache=True)
        second = model(ids[:, half:], past_key_values=first.past_key_values, use_cache=True)
        cached = torch.cat([first.logits, second.logits], dim=1)
        changed = ids.clone()
        changed[:, -1] = (changed[:, -1] + 1) % config.vocab_size
        prompt = ids[:, : config.n_positions - 4 if endless else half]  # to write beyond what it was trained at
        room = 8 if endless else min(8, config.n_positions - half)
        settings = {
            "max_new_tokens": room,
            "min_new_tokens": room,
            "do_sample": False,
            "pad_token_id": 0,
            "attention_mask": torch.ones_like(prompt),
        }
        greedy = [model.generate(prompt, use_cache=use, **settings).tolist() for use in (True, False)]
        probe = model(ids[:1]).logits[0]
        vocabulary = [(104729 * i) % config.vocab_size for i in range(16)]
    storages = {p.untyped_storage().data_ptr(): p.numel() for p in model.parameters()}
    with tempfile.TemporaryDirectory() as second_folder:  # the copy that a user's own save makes
        model.save_pretrained(second_folder)
        second_model = AutoModelForCausalLM.from_pretrained(second_folder, dtype=torch.float32, **trust).eval()
        with torch.no_grad():
            second_difference = (second_model(ids).logits - full).abs().max().item()
        python_files = sorted(file.name for file in Path(second_folder).glob("*.py"))
    tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    tokens = tokenizer.encode(sentence)
    return {
        "model_class": type(model).__name__,
        "model_type": AutoConfig.from_pretrained(folder, **trust).model_type,
        "custom_code": custom,
        "compressor_imported": sys.modules.get("compressor") is not None,
        "missing": sorted(loading["missing_keys"]),
        "unexpected": sorted(loading["unexpected_keys"]),
        "parameters": sum(storages.values()),
        "finite": bool(torch.isfinite(full).all()),
        "probe": {
            "ids": ids[0].tolist(),
            "tokens": vocabulary,
            "logits": probe[-1, vocabulary].tolist(),
            "logsumexp": probe.logsumexp(-1).tolist(),
        },
        "cache_difference": (cached - full).abs().max().item(),
        "causality_difference": (model(changed).logits[:, :-1] - full[:, :-1]).abs().max().item(),
        "generation_equal": greedy[0] == greedy[1],
        "second_save_difference": second_difference,
        "second_save_files": python_files,
        "files": sorted(file.name for file in Path(folder).glob("*.py")) if custom else [],
        "tokens": tokens,
        "text": tokenizer.decode(tokens),
        "pickles": sorted(file.name for pattern in _WEIGHTS for file in Path(folder).glob(pattern)),
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(json.dumps(main(*sys.argv[1:])))
