"""What caches hold by formula, against what caches of models hold."""

from __future__ import annotations

import pytest
import torch
from conftest import make_config
from transformers import DynamicCache, GPT2Config

from compressor.metrics.cache import cache_bytes
from compressor.modeling import GPT2CompressedLMHeadModel
from compressor.rewrites import from_record
from compressor.rewrites.compose import structure

RECORDS = [
    {"rewrite": "linformer", "block": 6, "slots": 2},
    {"rewrite": "linformer", "block": 5, "slots": 5, "layers": [1, 3]},
    {"rewrite": "nystromformer", "block": 4, "landmarks": 3},
    {"rewrite": "nystromformer", "block": 7, "landmarks": 3, "inverse": "newton", "layers": [0]},
    {"rewrite": "performer", "block": 4, "feature_map": "favor+", "features": 10},
    {"rewrite": "performer", "block": 9, "feature_map": "elu"},
    {"rewrite": "performer", "block": 64},
]


def held(cache: DynamicCache) -> int:
    tensors = []
    for layer in cache.layers:
        state = getattr(layer, "state", None)
        tensors += [layer.keys, layer.values] if state is None else list(state.values())
    return sum(tensor.nbytes for tensor in tensors if tensor.is_floating_point())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("record", RECORDS, ids=lambda record: "-".join(map(str, record.values())))
def test_the_formula_is_what_a_cache_holds_at_most(record, dtype):
    base = make_config()
    config = structure([from_record(record).resolved(base)], base)
    torch.manual_seed(0)
    model = GPT2CompressedLMHeadModel(config).to(dtype).eval()
    cache, most = DynamicCache(config=config), 0
    for tokens in range(1, 32):
        with torch.no_grad():
            model(torch.full((1, 1), tokens), past_key_values=cache, use_cache=True)
        most = max(most, held(cache))
        assert cache_bytes(config, tokens, dtype.itemsize) == most


def test_softmax_keeps_keys_and_values():
    assert cache_bytes(GPT2Config(), 1024, 4) == 12 * 2 * 768 * 1024 * 4
