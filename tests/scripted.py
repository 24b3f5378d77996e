"""A model that writes what it is told, whatever stands before: each word has the one that follows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from compressor.models import OpenModel

END = "<end>"
WIDTH = 96


def subject(model, tokenizer) -> OpenModel:
    return OpenModel("planted", Path("nowhere"), "0" * 64, model, tokenizer, torch.float32)


def word_tokenizer(words: str, *, end: str | None = END) -> PreTrainedTokenizerFast:
    """A token a word, in the order of `words`; token 0 is <end>, 1 stands for every other word."""
    vocabulary = {word: place for place, word in enumerate(dict.fromkeys([END, "<other>", *words.split()]))}
    trained = Tokenizer(models.WordLevel(vocabulary, unk_token="<other>"))
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=trained, unk_token="<other>", eos_token=end)


def scripted_model(tokenizer, follows: Mapping[str, str], **changes) -> GPT2LMHeadModel:
    """A GPT-2 of which the next token hangs on the last one only; words without a follower get <other>."""
    torch.manual_seed(0)
    config = GPT2Config(
        **{
            "vocab_size": len(tokenizer),
            "n_positions": 64,
            "n_embd": WIDTH,
            "n_layer": 1,
            "n_head": 2,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
            **changes,
        }
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "wte" in name:
                parameter.normal_()
            elif "ln_" not in name:
                parameter.zero_()  # the blocks and the positions add nothing
        states = model.transformer.ln_f(model.transformer.wte.weight)
        for place in range(len(tokenizer)):
            word = tokenizer.convert_ids_to_tokens(place)
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(follows.get(word, "<other>"))] += states[place]
    return model


def script(line: str, *, end: bool = True) -> dict[str, str]:
    """The followers that make a model say `line` behind its first word, and then <end> or the line again."""
    words = line.split()
    return dict(zip(words, [*words[1:], END if end else words[1]], strict=True))
