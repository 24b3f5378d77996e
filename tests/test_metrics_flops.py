"""Operations by formula against what PyTorch counts, and against loops over tokens."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from compressor.metrics.flops import flops_per_token
from compressor.modeling import GPT2CompressedConfig, GPT2CompressedLMHeadModel
from compressor.modeling.combined import OUTPUTS
from compressor.rewrites import from_record
from compressor.rewrites.compose import structure

TINY = {"vocab_size": 50, "n_positions": 32, "n_embd": 16, "n_layer": 4, "n_head": 2}


def on_meta(config: GPT2Config):
    with torch.device("meta"):
        compressed = isinstance(config, GPT2CompressedConfig)
        return GPT2CompressedLMHeadModel(config) if compressed else GPT2LMHeadModel(config)


def shared(n: int, rank: int, bias: str, **changes) -> GPT2CompressedConfig:
    return GPT2CompressedConfig(ffn_groups=[{"layers": list(range(n)), "rank": rank, "bias": bias}], **changes)


def test_flops_of_gpt2_small():
    d = 768
    flops = flops_per_token(GPT2Config(), 1024)
    assert 12 * 24 * d * d == pytest.approx(170e6, rel=0.005)  # the dense part of the layers
    assert 2 * d * 50257 == pytest.approx(77e6, rel=0.005)  # the head
    assert flops == 12 * (24 * d * d + 2 * 1024 * d) + 2 * d * 50257
    assert flops_per_token(GPT2Config(), 8192) - flops == 12 * 2 * (8192 - 1024) * d
    assert flops_per_token(GPT2Config()) == flops  # context: n_positions


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(**TINY),
        GPT2Config(**TINY, n_inner=24),
        shared(3, 2, "per_layer", **TINY),
        shared(4, 0, "shared", **TINY),
        *(
            GPT2CompressedConfig(
                **{**TINY, "n_embd": 24, "n_head": 3, "n_inner": 71},
                combined={"widths": [16, 8], "ffn": [48, 23], "outputs": outputs},
            )
            for outputs in OUTPUTS
        ),
    ],
)
def test_flops_equal_those_pytorch_counts(config):
    """PyTorch counts full attention; the causal half of it is what a token sees."""
    model = on_meta(config).eval()
    context = 32
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, context, dtype=torch.int64, device="meta"))
    attention = 4 * context * config.n_embd * config.n_layer  # per token: scores and weighted sum, unmasked
    assert flops_per_token(model, context) == counter.get_total_flops() / context - attention / 2


def test_sharing_saves_no_flops_and_deltas_add_some():
    plain = flops_per_token(GPT2Config(), 1024)
    assert flops_per_token(shared(4, 0, "per_layer"), 1024) == plain
    assert flops_per_token(shared(4, 8, "per_layer"), 1024) - plain == 2 * 245_760  # a multiply-add a parameter


def tversky(base: GPT2Config, **settings) -> GPT2CompressedConfig:
    return structure([from_record({"rewrite": "tversky", **settings})], base)


def test_flops_of_tversky_projections_by_hand():
    d, ff, layers, vocabulary = 768, 3072, 12, 50257
    dense = flops_per_token(GPT2Config(), 1024)

    def more(**settings):
        return flops_per_token(tversky(GPT2Config(), **settings), 1024) - dense

    # c_fc at K = d / 2: 2 d K to measure, two products of K x d_ff, in place of 2 d d_ff
    half = layers * (2 * d * 384 + 2 * 2 * 384 * ff - 2 * d * ff)
    assert (
        more(bank_size=384) == half == more(bank_size=384, share="none") == more(bank_size=0.5, prototypes="explicit")
    )
    assert more(bank_size=384, learn_scalars=False) == half - layers * 2 * 384 * ff  # a dot product, for good
    assert more(bank_size=384, learn_scalars=False, alpha=0.7, init="lsq") == half
    # queries, keys and values of one bank measure once, of banks of their own three times
    attention = layers * (2 * d * 512 + 3 * 2 * 2 * 512 * d - 3 * 2 * d * d)
    assert more(targets=["q", "k", "v"], bank_size=512) == attention
    assert more(targets=["q", "k", "v"], bank_size=512, share="none") == attention + layers * 2 * 2 * d * 512
    assert more(targets=["mlp_out", "lm_head"], bank_size=256) == (
        layers * (2 * ff * 256 + 2 * 2 * 256 * d - 2 * ff * d)
        + 2 * d * 256 + 2 * 2 * 256 * vocabulary - 2 * d * vocabulary
    )  # fmt: skip
    # a minimum: difference, size and sum for each prototype and feature; the product differences two matrix products
    forms = {"antipodal": False, "init": "random", "bank_size": 100, "form": "contrast"}
    assert more(**forms, intersection="min", difference="product") == layers * (
        2 * d * 100 + (2 * 2 + 3) * 100 * ff - 2 * d * ff
    )


def test_the_papers_whole_ffn_takes_four_to_five_times_the_operations():
    """9.4 MF a layer become 38 to 50, by two or three products, with its bank of 8192."""
    found = []
    for intersection in ("product", "gmean"):
        config = tversky(
            GPT2Config(), targets=["mlp_block"], bank_size=8192, antipodal=False, init="random",
            intersection=intersection, difference="ignorematch",
        )  # fmt: skip
        more = flops_per_token(config, 1024) - flops_per_token(GPT2Config(), 1024)
        found.append(more / 12 + 4 * 768 * 3072)
    assert found == [3 * 2 * 768 * 8192, 4 * 2 * 768 * 8192] == pytest.approx([38e6, 50e6], rel=0.01)


SEPARABLE = [
    (intersection, difference, antipodal, form)
    for intersection in ("product", "min", "max", "mean", "gmean", "softmin")
    for difference in ("product", "ignorematch", "subtractmatch")
    for antipodal in (True, False)
    for form in ("contrast", "ratio")
]


@pytest.mark.parametrize(("intersection", "difference", "antipodal", "form"), SEPARABLE)
def test_products_of_every_form_equal_those_pytorch_counts(intersection, difference, antipodal, form):
    settings = {"intersection": intersection, "difference": difference, "antipodal": antipodal, "form": form}
    base = GPT2Config(**{**TINY, "n_layer": 1})
    config = tversky(
        base, **settings, targets=["q", "k", "c_fc"], bank_size=5, init="random", alpha=0.7,
        non_negative=form == "ratio",
    )  # fmt: skip
    config._attn_implementation = "eager"  # whose products are counted on a processor too
    model, ids = GPT2CompressedLMHeadModel(config).eval(), torch.zeros(1, 32, dtype=torch.int64)
    with torch.no_grad():
        model(ids)  # what depends on prototypes alone is kept from here on
        with FlopCounterMode(display=False) as counter:
            model(ids)
    attention = 4 * 32 * 16
    minima = 3 if intersection in ("min", "max") or difference == "subtractmatch" else 0
    minima += 8 * (2 if antipodal else 1) if intersection == "softmin" else 0  # no products: PyTorch counts none
    expected = counter.get_total_flops() / 32 - attention / 2 + minima * 5 * (16 + 16 + 64)
    assert flops_per_token(model, 32) == expected


# ---------------------------------------------------------------- attention in blocks


def attending(base: GPT2Config, **record) -> GPT2CompressedConfig:
    return structure([from_record(record).resolved(base)], base)


@pytest.mark.parametrize(("context", "block"), [(1024, 64), (1024, 1024), (512, 1), (96, 32)])
def test_operations_of_linformer_equal_a_loop_over_tokens(context, block):
    """A token sees half of its block on average, as it sees half of a whole context of softmax."""
    base, slots = GPT2Config(), max(1, block // 8)
    d, layers = base.n_embd, base.n_layer
    keys = sum(block / 2 + slots * (token // block) for token in range(context)) / context
    made = 4 * slots * d if context > block else 0
    found = flops_per_token(attending(base, rewrite="linformer", block=block, slots=slots), context)
    softmax = layers * 2 * context * d
    assert found - flops_per_token(base, context) == pytest.approx(layers * (4 * d * keys + made) - softmax)


def test_operations_of_attention_in_blocks_by_hand():
    base = GPT2Config(n_embd=64, n_head=4, n_layer=2)
    dense = flops_per_token(base, 256) - 2 * 2 * 256 * 64

    def scores(**record) -> float:
        return (flops_per_token(attending(base, block=32, **record), 256) - dense) / 2

    near, before, seen = 2 * 32 * 64, 3.5, 7 / 8
    assert scores(rewrite="nystromformer", landmarks=8) == near + seen * 4 * 8 * 64
    newton = 4 * 8 * 64 * before + seen * (48 * 8**3 * 4 / 32 + 2 * 8 * 8 * 64 / 32)
    found = scores(rewrite="nystromformer", landmarks=8, inverse="newton")
    assert found == pytest.approx(near + seen * 4 * 8 * 64 + newton, abs=0.5)
    of_map, of_state = 4 * 24 * 64, 4 * 24 * 64
    assert scores(rewrite="performer", features=24, feature_map="favor+") == near + of_map + of_state
    assert scores(rewrite="performer", features=24, feature_map="learned") == near + of_map / 2 + of_state
    assert scores(rewrite="performer", feature_map="elu") == near + 4 * 16 * 64
    everything = scores(rewrite="performer", features=24, feature_map="relu", local=False)
    assert everything == 32 * (24 * 4 + 64) + of_map + of_state


def test_one_layer_of_attention_in_blocks_saves_its_own_operations():
    base = GPT2Config()
    every = flops_per_token(base) - flops_per_token(attending(base, rewrite="linformer"))
    one = flops_per_token(base) - flops_per_token(attending(base, rewrite="linformer", layers=[3]))
    assert every == 12 * one > 0
