"""alibi against plain GPT-2 that is handed the same embeddings and biases; slopes against the paper's own rule."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from toy import logits, toy_blocks, toy_gpt2
from transformers import AutoModelForCausalLM, GPT2Config

from compressor import gpt2, models
from compressor.artifacts import provenance
from compressor.checkpoint_config import check_config
from compressor.errors import UserError
from compressor.finetune import StateFolder, finetune, resolve_train
from compressor.metrics.size import parameters
from compressor.modeling.alibi import geometric_slopes
from compressor.rewrites import from_record
from compressor.rewrites.alibi_fit import fitted_slopes, scores_by_distance
from compressor.rewrites.compose import apply, structure

LONG = 150  # tokens; the toy was built for 64


def made(original, **fields):
    rewrite = from_record({"rewrite": "alibi", **fields})
    return apply([rewrite], original, None, calibration=toy_blocks(original.config, rows=4))


@pytest.fixture(scope="module")
def endless(original):
    return made(original, slopes="geometric", anneal=0)


def some_ids(rows=2, tokens=LONG, seed=3):
    return torch.randint(1, 97, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def reference(original, ids, share, slopes, first=(0.0, 0.0, 0.0, 0.0)):
    """Plain GPT-2, whose positions add nothing, with the embeddings and the biases as its inputs."""
    plain = copy.deepcopy(original)
    plain.set_attn_implementation("eager")
    positions = plain.transformer.wpe.weight.detach().clone()
    plain.transformer.wpe.weight.data.zero_()
    tokens = ids.shape[1]
    mean = positions[1:].mean(0)
    added = share * positions[:tokens] if share else torch.zeros(tokens, ids.new_empty(0, 32).shape[1])
    added = added + (1 - share) * mean
    added[0] += (1 - share) * (positions[0] - mean)
    behind = torch.arange(tokens) - torch.arange(tokens)[:, None]
    bias = torch.tensor(slopes)[:, None, None] * behind
    bias[:, :, 0] = torch.tensor(first)[:, None]
    bias = (1 - share) * bias
    bias = bias.masked_fill(behind > 0, float("-inf"))[None].expand(len(ids), -1, -1, -1)
    with torch.no_grad():
        return plain(
            inputs_embeds=plain.transformer.wte(ids) + added,
            attention_mask=bias,
            position_ids=torch.zeros(1, tokens, dtype=torch.int64),
        ).logits


# ---------------------------------------------------------------- slopes


def papers_slopes(heads):
    """As the authors give them: for a power of two a geometric series from 2^(-8 / n); else recursion."""
    power = 2 ** int(np.floor(np.log2(heads)))
    if power == heads:
        start = 2 ** (-(2 ** -(np.log2(heads) - 3)))
        return [start * start**i for i in range(heads)]
    return papers_slopes(power) + papers_slopes(2 * power)[0::2][: heads - power]


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 16, 20, 25, 32])
def test_geometric_slopes_are_the_papers(heads):
    assert np.allclose(geometric_slopes(heads), papers_slopes(heads), rtol=1e-12)
    assert len(set(geometric_slopes(heads))) == heads  # the source repeats some


def test_geometric_slopes_of_gpt2_small():
    exponents = [-1, -2, -3, -4, -5, -6, -7, -8, -0.5, -1.5, -2.5, -3.5]
    assert geometric_slopes(12) == pytest.approx([2**exponent for exponent in exponents])


def test_scores_by_distance_against_all_pairs(original):
    blocks = toy_blocks(original.config, rows=5)
    means, count = scores_by_distance(original, blocks.batches(), [0, 4])
    model = copy.deepcopy(original)
    sums, pairs = {layer: np.zeros((4, 64)) for layer in (0, 4)}, np.zeros(64)
    for ids, mask in blocks.batches():
        kept = {}
        for layer in sums:
            gpt2.attention(model, layer).register_forward_pre_hook(
                lambda _, given, layer=layer, kept=kept: kept.__setitem__(layer, given[0])
            )
        with torch.no_grad():
            model(ids)
        for real in mask.tolist():
            for i in range(64):
                for j in range(1, i + 1):
                    if real[i] and real[j]:
                        pairs[i - j] += 1
        for layer, x in kept.items():
            query, key, _ = gpt2.queries_keys_values(model, layer, x)
            scores = (query @ key.transpose(-1, -2) * 8**-0.5).detach().double().numpy()
            for row, real in enumerate(mask.numpy()):
                for i in range(64):
                    for j in range(1, i + 1):
                        if real[i] and real[j]:
                            sums[layer][:, i - j] += scores[row, :, i, j]
    assert np.array_equal(count.numpy(), pairs)
    for layer, total in sums.items():
        assert np.allclose(means[layer].numpy()[:, pairs > 0], (total / pairs.clip(1))[:, pairs > 0], atol=1e-5)


def test_fitted_slopes_are_a_least_squares_line_through_all_pairs(original):
    blocks = toy_blocks(original.config, rows=3)
    means, count = scores_by_distance(original, blocks.batches(), [1])
    distance = np.arange(64)
    wanted = [-np.polyfit(distance, mean, 1, w=np.sqrt(count.numpy()))[0] for mean in means[1].numpy()]
    found = fitted_slopes(original, blocks.batches(), [1])[1].numpy()
    assert np.allclose(found, np.clip(wanted, 0, None), atol=1e-7) and (found > 0).any()


def test_learned_slopes_begin_as_fitted(original):
    one, other = (made(original, slopes=slopes, anneal=0) for slopes in ("fitted", "learned"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    steeper = made(original, slopes="fitted", anneal=0, least=20.0)
    for model, least in ((one, 12), (steeper, 20)):
        lowest = min(gpt2.attention(model, layer).alibi.slopes(1.0).min().item() for layer in range(6))
        assert lowest == pytest.approx(least / 64)


@pytest.mark.parametrize("slopes", ["fitted", "learned"])
def test_what_is_new_trains_beside_adapters_and_deltas(original, alignment, slopes):
    """alibi has no deltas of its own: slopes alone do not replace positions."""
    alibi, blocks = from_record({"rewrite": "alibi", "slopes": slopes}), toy_blocks(original.config, rows=4)
    shared = from_record({"rewrite": "soft_shared", "n": 3, "rank": 2}).resolved(original.config)
    assert resolve_train("auto", made(original, slopes=slopes), [alibi]) == "lora"
    for rewrites, mode in (([alibi], "lora"), ([shared, alibi], "deltas")):
        model = apply(rewrites, original, alignment, calibration=blocks)
        before = copy.deepcopy(model.state_dict())
        assert finetune(model, blocks, None, rewrites=rewrites, **SETTINGS).train == mode
        after = model.state_dict()
        mean = after["transformer.wte.weight"] - before["transformer.wte.weight"]
        assert not torch.equal(after["transformer.wpe.first"], before["transformer.wpe.first"])
        assert all(after[key].any() for key in after if "alibi.first" in key)
        assert (mean[0] - before["transformer.wpe.mean"]).abs().max() > 1e-3
        moved = [not torch.equal(after[key], before[key]) for key in after if "log_slopes" in key]
        assert len(moved) == 6 and set(moved) == {slopes == "learned"}


# ---------------------------------------------------------------- the function


def test_with_learned_positions_it_is_the_original(original):
    model, ids = made(original, slopes="geometric", anneal=0.5), some_ids(tokens=64)
    assert torch.equal(logits(model, ids), logits(original, ids))
    folded = from_record({"rewrite": "alibi"}).fold(model)
    assert type(folded) is type(original) and torch.equal(logits(folded, ids), logits(original, ids))
    with pytest.raises(IndexError):
        logits(model, some_ids(tokens=65))


@pytest.mark.parametrize("share", [0.75, 0.25, 0.0])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_on_the_way(original, share, kind):
    model, ids = made(original, slopes="geometric", anneal=0.5), some_ids(tokens=64)
    model.set_attn_implementation(kind)
    from_record({"rewrite": "alibi", "anneal": 0.5}).on_step(model, 0.5 * (1 - share))
    first = (-1.0, 0.5, 2.0, -3.0)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.alibi.first.copy_(torch.tensor(first))
    wanted = reference(original, ids, share, geometric_slopes(4), first)
    assert (logits(model, ids) - wanted).abs().max() <= 1e-5
    with torch.no_grad():  # one token behind a cache has its bias by another way
        cache = model(ids[:, :50], use_cache=True).past_key_values
        assert (model(ids[:, 50:51], past_key_values=cache).logits[:, 0] - wanted[:, 50]).abs().max() <= 1e-5


def test_dropping_positions_changes_no_probability(original):
    model, ids = made(original, slopes="geometric", anneal=0.5), some_ids(tokens=64)
    rewrite = from_record({"rewrite": "alibi", "anneal": 0.5})
    rewrite.on_step(model, 0.7)
    before, count = logits(model, ids).log_softmax(-1), parameters(model)
    embeddings = original.transformer.wte.weight.detach().clone()
    rewrite.finish(model)
    assert torch.equal(original.transformer.wte.weight, embeddings)  # which were the model's own until then
    assert (logits(model, ids).log_softmax(-1) - before).abs().max() <= 1e-5
    assert model.config.alibi == {"slopes": "geometric", "learned_positions": False, "first": True}
    assert parameters(model) == count - 64 * 32 - 32
    at_once = made(original, slopes="geometric", anneal=0)
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in at_once.state_dict().items()
    }
    assert (logits(model, ids) - logits(at_once, ids)).abs().max() <= 1e-5
    rewrite.finish(model)  # nothing is left to do


def test_an_untied_head_sees_the_same_states():
    original = toy_gpt2(tie_word_embeddings=False)
    model, ids = made(original, slopes="geometric", anneal=0), some_ids(tokens=64)
    assert (logits(model, ids) - reference(original, ids, 0.0, geometric_slopes(4))).abs().max() <= 1e-5
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
class TestBeyondItsPositions:
    def test_against_plain_gpt2_with_the_biases(self, endless, original, kind):
        model, ids = copy.deepcopy(endless), some_ids()
        model.set_attn_implementation(kind)
        first = (-1.0, 0.5, 2.0, -3.0)
        with torch.no_grad():
            for block in model.transformer.h:
                block.attn.alibi.first.copy_(torch.tensor(first))
        wanted, found = reference(original, ids, 0.0, geometric_slopes(4), first), logits(model, ids)
        assert (found.log_softmax(-1) - wanted.log_softmax(-1)).abs().max() <= 1e-4

    def test_cached(self, endless, kind):
        model, ids = copy.deepcopy(endless), some_ids()
        with torch.no_grad():
            model.transformer.h[1].attn.alibi.first.fill_(3.0)
        model.set_attn_implementation(kind)
        full, cache, parts = logits(model, ids), None, []
        with torch.no_grad():
            for chunk in ids.split([70, 1, 1, 38, 40], dim=1):
                step = model(chunk, past_key_values=cache, use_cache=True)
                cache, parts = step.past_key_values, [*parts, step.logits]
        assert (torch.cat(parts, 1) - full).abs().max() <= 1e-4

    def test_padded(self, endless, kind):
        model, ids = copy.deepcopy(endless), some_ids()
        model.set_attn_implementation(kind)
        full, pads = logits(model, ids), torch.zeros(2, 9, dtype=torch.int64)
        mask = torch.cat([pads, torch.ones_like(ids)], 1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        left = logits(model, torch.cat([pads, ids], 1), attention_mask=mask, position_ids=positions)
        assert (left[:, 9:] - full).abs().max() <= 1e-4
        with torch.no_grad():  # and one token at a time
            step = model(
                torch.cat([pads, ids[:, :-1]], 1),
                attention_mask=mask[:, :-1],
                position_ids=positions[:, :-1],
                use_cache=True,
            )
            last = model(
                ids[:, -1:], attention_mask=mask, position_ids=positions[:, -1:], past_key_values=step.past_key_values
            )
        assert (last.logits[:, 0] - full[:, -1]).abs().max() <= 1e-4

    def test_generates_alike_with_and_without_a_cache(self, endless, kind):
        model, ids = copy.deepcopy(endless), some_ids(tokens=60)
        model.set_attn_implementation(kind)
        settings = {"max_new_tokens": 30, "min_new_tokens": 30, "pad_token_id": 0, "do_sample": False}
        settings["attention_mask"] = torch.ones_like(ids)
        for beams in (1, 3):
            cached, fresh = (model.generate(ids, use_cache=use, num_beams=beams, **settings) for use in (True, False))
            assert torch.equal(cached, fresh) and cached.shape == (2, 90)


def test_the_first_token_is_the_first_real_one(endless):
    """Rested on from any distance, wherever pads put it: planted so that nothing else counts."""
    model = copy.deepcopy(endless)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.alibi.first.fill_(60.0)
    for kind in ("eager", "sdpa"):
        model.set_attn_implementation(kind)
        ids = some_ids(rows=1, tokens=100)
        full = logits(model, ids)
        changed = ids.clone()
        changed[:, 1:60] = (changed[:, 1:60] + 5) % 97
        assert (logits(model, changed)[:, 70:] - full[:, 70:]).abs().max() <= 1e-5
        mask = torch.cat([torch.zeros(1, 7, dtype=torch.int64), torch.ones_like(ids)], 1)
        padded = torch.cat([torch.full((1, 7), 3), ids], 1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        left = logits(model, padded, attention_mask=mask, position_ids=positions)
        assert (left[:, 7:] - full).abs().max() <= 1e-5


def test_a_static_cache(endless):
    ids = some_ids(rows=2, tokens=40)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    settings["attention_mask"] = (torch.arange(40) >= torch.tensor([[0], [9]])).long()
    static, fresh = (endless.generate(ids, **more, **settings) for more in (
        {"cache_implementation": "static", "disable_compile": True}, {"use_cache": False},
    ))  # fmt: skip
    assert torch.equal(static, fresh)


def test_biases_of_bfloat16_are_those_of_float32(endless):
    """Far into a text m j is large, and rounded to bfloat16 it would tell neighbours apart by nothing."""
    model, ids = copy.deepcopy(endless), some_ids(rows=1, tokens=700)
    wanted = logits(model, ids).softmax(-1)
    for kind in ("eager", "sdpa"):
        low = copy.deepcopy(model).to(torch.bfloat16)
        low.set_attn_implementation(kind)
        apart = (logits(low, ids).float().softmax(-1) - wanted).abs().sum(-1) / 2
        assert apart.mean() < 0.02 and apart.max() < 0.06  # total variation


def test_products_that_carry_the_bias_are_exact_in_bfloat16(endless):
    own, tokens = copy.deepcopy(endless).transformer.h[0].attn.alibi, 1500
    with torch.no_grad():
        own.log_slopes.copy_(torch.tensor([0.5, 0.25, 0.125, 0.0625]).log())
        own.first.copy_(torch.tensor([-1.4, 0.3, 8.0, -20.0]))
        query, key = (torch.zeros(1, 4, size, 8, dtype=torch.bfloat16) for size in (3, tokens))
        wider = own.widened(query, key, tokens - 3, 1.0, 0.5, torch.zeros(1, dtype=torch.int64))
    found = 0.5 * wider[0].double() @ wider[1].double().transpose(-1, -2)
    behind = torch.arange(tokens) - torch.arange(tokens - 3, tokens)[:, None]
    wanted = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None].double() * behind
    assert torch.equal(found[0, :, :, 1:], wanted[:, :, 1:])
    assert torch.allclose(found[0, :, :, 0], own.first.double()[:, None], rtol=2**-7)


def test_reloads_and_goes_beyond_its_positions(endless, tmp_path):
    model, ids = copy.deepcopy(endless), some_ids()
    with torch.no_grad():
        model.transformer.h[2].attn.alibi.log_slopes.add_(0.37)  # slopes of one's own
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert len(models.probe(model)["ids"]) == 72 and gpt2.longest(model.config) is None


# ---------------------------------------------------------------- recovery


SETTINGS = {"steps": 6, "batch_tokens": 512, "learning_rate": 1e-2, "autocast": "none", "evaluate_every": 3}


def test_a_recovery_ends_without_learned_positions(original):
    model, blocks = made(original, slopes="learned", anneal=0.5), toy_blocks(original.config)
    before = model.transformer.h[0].attn.alibi.log_slopes.detach().clone()
    result = finetune(
        model, blocks, blocks, rewrites=[from_record({"rewrite": "alibi", "slopes": "learned"})], train="lora",
        **SETTINGS,
    )  # fmt: skip
    assert result.best_step == 6  # what came before was another model
    assert "transformer.wpe.weight" not in model.state_dict() and gpt2.longest(model.config) is None
    assert not torch.equal(model.transformer.h[0].attn.alibi.log_slopes, before)
    assert model.config.alibi == {"slopes": "learned", "learned_positions": False, "first": True}
    assert logits(model, some_ids()).shape == (2, LONG, 97)
    check_config("it", model.config)


def test_without_a_way_to_go_the_best_state_is_kept(original):
    model, blocks = made(original, slopes="geometric", anneal=0), toy_blocks(original.config)
    rewrite = from_record({"rewrite": "alibi", "slopes": "geometric"})  # nothing is left to fade out in this model
    result = finetune(
        model, blocks, blocks, rewrites=[rewrite], train="full", **{**SETTINGS, "learning_rate": 3.0, "warm_up": 0}
    )
    assert result.best_step == 0 and result.evaluations[-1].nll > result.evaluations[0].nll


def test_the_last_evaluation_is_of_the_model_that_is_left(original):
    model, blocks = made(original, slopes="geometric", anneal=1.0), toy_blocks(original.config)
    rewrite = from_record({"rewrite": "alibi", "slopes": "geometric", "anneal": 1.0})
    result = finetune(model, blocks, blocks, rewrites=[rewrite], train="full", **{**SETTINGS, "steps": 1})
    nll = 0.0
    for ids, mask in blocks.batches():
        found = logits(model, ids, attention_mask=mask.long())[:, :-1].log_softmax(-1)
        picked = -found.gather(-1, ids[:, 1:, None]).squeeze(-1)
        nll += float(picked[mask[:, 1:]].double().sum())
    assert result.evaluations[-1].nll == pytest.approx(nll / int(blocks.mask[:, 1:].sum()), rel=1e-4)


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("stop", [1, 4])
def test_resumed_on_the_way_it_ends_as_it_would_have(original, tmp_path, train, stop):
    """At first the new parameters are idle, at last the old ones: all have their moments all the same."""
    blocks = toy_blocks(original.config)
    origin = provenance(seed=0, base_model="toy", base_hash="1", device="cpu", dtype="float32")
    before = made(original, slopes="learned", anneal=0.5)

    def run(name, stop_after=99, **more):
        def progress(step):
            if step.step > stop_after:
                raise InterruptedError

        model = copy.deepcopy(before)
        rewrites = [from_record({"rewrite": "alibi", "slopes": "learned"})]
        finetune(
            model, blocks, blocks, rewrites=rewrites, train=train, checkpoint_every=1, progress=progress,
            state_folder=StateFolder(tmp_path / name, origin), **SETTINGS, **more,
        )  # fmt: skip
        return model.state_dict()

    whole = run("whole")
    with pytest.raises(InterruptedError):
        run("broken", stop_after=stop)
    found = run("broken", resume=True)
    assert found.keys() == whole.keys() and all(torch.equal(tensor, whole[key]) for key, tensor in found.items())


# ---------------------------------------------------------------- what is refused


def test_counts_of_gpt2_small():
    config = GPT2Config()
    rewrite = from_record({"rewrite": "alibi", "anneal": 0})
    before, after = (parameters(models.build(item)) for item in (config, structure([rewrite], config)))
    assert before == 124_439_808
    # wpe, 0.63 %; the first position's vector stays, slopes and biases of the first token come
    assert before - after == 786_432 - 768 - 2 * 12 * 12
    assert round(100 * 786_432 / before, 2) == 0.63


def test_what_is_refused(original):
    config = original.config
    with pytest.raises(UserError, match=r"anneal is 1.5; allowed: 0 to 1"):
        from_record({"rewrite": "alibi", "anneal": 1.5}).check(config)
    with pytest.raises(UserError, match=r"least is 0.0; allowed: above 0, in nats"):
        from_record({"rewrite": "alibi", "least": 0.0}).check(config)
    with pytest.raises(UserError, match="alibi and efficient_attention"):
        structure([from_record({"rewrite": "linformer"}), from_record({"rewrite": "alibi"})], config)
    with pytest.raises(UserError, match="fall with distance"):
        from_record({"rewrite": "alibi"}).fold(made(original, slopes="geometric", anneal=0))
    broken = copy.deepcopy(made(original, slopes="geometric").config)
    for entry, said in (({"slopes": "steep"}, "as slopes in alibi"), ({"first": 1}, "as first in alibi")):
        changed = copy.deepcopy(broken)
        changed.alibi = {**broken.alibi, **entry}
        with pytest.raises(UserError, match=said):
            check_config("it", changed)


def test_beside_other_rewrites(original, alignment):
    rewrites = [
        from_record({"rewrite": "soft_shared", "n": 3, "rank": 2}).resolved(original.config),
        from_record({"rewrite": "dropped_n", "layers": [5]}).resolved(original.config),
        from_record({"rewrite": "alibi", "slopes": "fitted", "anneal": 0}),
    ]
    model = apply(rewrites, original, alignment, calibration=toy_blocks(original.config, rows=4))
    assert model.config.n_layer == 5 and logits(model, some_ids()).isfinite().all()
    slopes = fitted_slopes(original, toy_blocks(original.config, rows=4).batches(), [4])[4]
    assert torch.allclose(gpt2.attention(model, 4).alibi.slopes(1.0), slopes.clamp_min(12 / 64), rtol=1e-4)
    assert dataclasses.asdict(rewrites[2]) == {"slopes": "fitted", "least": 12.0, "anneal": 0}


def test_slopes_go_with_their_layers(original, alignment):
    """Beside a rewrite that removes some: each layer that is left has those of its own attention."""
    rewrites = [
        from_record({"rewrite": "dropped_n", "layers": [1, 4]}).resolved(original.config),
        from_record({"rewrite": "alibi", "slopes": "fitted", "anneal": 0, "least": 1e-3}),
    ]
    blocks = toy_blocks(original.config, rows=4)
    model = apply(rewrites, original, alignment, calibration=blocks)
    wanted = fitted_slopes(original, blocks.batches(), [0, 2, 3, 5])
    found = [gpt2.attention(model, layer).alibi.slopes(1.0) for layer in range(4)]
    for own, slopes in zip(found, wanted.values(), strict=True):
        assert torch.allclose(own, slopes.clamp_min(1e-3 / 64), rtol=1e-4)
    assert len({tuple(own.tolist()) for own in found}) == 4
