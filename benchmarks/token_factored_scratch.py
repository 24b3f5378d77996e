"""Vanilla, Factored, FactoredALiBi and SASP trained alike from scratch, by characters, and their perplexity by length.

    python -m benchmarks.token_factored_scratch [--steps 1500] [--models Vanilla FactoredALiBi]

The preset "tiny" (2 layers, width 128, 128 characters) on the demo's text, without dropout, 16 rows of 128 characters a
step, learning rate 2e-3, one seed. Perplexity is per character of test text, windows of so many characters that advance
by half; only FactoredALiBi takes more than 128.
"""

from __future__ import annotations

import argparse

import torch

from compressor import estimate_model_parameters, get_model, list_available_models, load_alibi_config_preset
from compressor.data import recipe_text
from compressor.finetune import finetune
from compressor.gpt2 import longest
from compressor.metrics.perplexity import perplexity
from compressor.studies.attention.characters import character_text

LENGTHS = (32, 64, 128, 256, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--models", nargs="+", default=sorted(list_available_models()))
    options = parser.parse_args()
    config = load_alibi_config_preset("tiny")
    config.batch_size, config.dropout, config.learning_rate = 16, 0.0, 2e-3
    text = character_text("demo", block_size=128, training_rows=24000, selection_rows=64, test_rows=64, seed=0)
    config.update_from_tokenizer(text.tokenizer)
    test = recipe_text("demo", "test")
    print(f"{options.steps} steps of {16 * 128:,} characters\n")
    print(f"| model | parameters | {' | '.join(map(str, LENGTHS))} |\n| --- |{' ---: |' * (1 + len(LENGTHS))}")
    for name in options.models:
        torch.manual_seed(0)
        model = get_model(name, config)
        finetune(model, text.training, text.selection, steps=options.steps, **config.training())
        most = longest(model.config)
        found = [
            f"{perplexity(model, text.tokenizer, test, context=length, max_tokens=16384)[0].value:.2f}"
            if most is None or length <= most
            else "-"
            for length in LENGTHS
        ]
        print(f"| {name} | {estimate_model_parameters(config, name):,} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()
