"""pruned: which weights go, how many, and that recovery leaves them at 0."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional
from toy import toy_blocks, toy_config, toy_gpt2

from compressor.errors import UserError
from compressor.finetune import finetune, resolve_train
from compressor.metrics.size import non_zero, parameters
from compressor.rewrites import from_record
from compressor.rewrites.compose import apply
from compressor.rewrites.pruned import Pruned, smallest

LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
NAMES = [f"transformer.h.{layer}.{linear}.weight" for layer in range(6) for linear in LINEARS]
WEIGHTS = 6 * 12 * 32 * 32


def _make(original, alignment, **record):
    rewrite = Pruned(**record).resolved(original.config)
    return rewrite, apply([rewrite], original, alignment)


def _flat(model):
    state = model.state_dict()
    return np.concatenate([state[name].detach().double().numpy().ravel() for name in NAMES])


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.937, 1.0])
def test_the_smallest_of_all_blocks_together_go_and_nothing_else_changes(original, alignment, sparsity):
    before = copy.deepcopy(original.state_dict())
    _, model = _make(original, alignment, sparsity=sparsity)
    weights, count = _flat(original), round(sparsity * WEIGHTS)
    expected = weights.copy()
    expected[np.argsort(np.abs(weights), kind="stable")[:count]] = 0
    np.testing.assert_array_equal(_flat(model), expected)
    shares = [float((model.state_dict()[name] == 0).float().mean()) for name in NAMES]
    assert max(shares) - min(shares) > 0.01 or sparsity == 1, "as many of each linear: not global"
    for name, tensor in model.state_dict().items():
        assert name in NAMES or torch.equal(tensor, before[name]), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())
    assert parameters(model) == parameters(original) and model.config.n_layer == 6


def test_of_equal_magnitudes_the_first_go_so_that_the_count_is_exact():
    generator = torch.Generator().manual_seed(4)
    tensors = [torch.randint(-3, 4, shape, generator=generator).float() for shape in ((7, 5), (3, 11), (40, 2))]
    flat = torch.cat([tensor.flatten() for tensor in tensors]).numpy()
    for count in (0, 1, 20, 77, 147, len(flat)):
        mask = np.zeros(len(flat), bool)
        mask[np.argsort(np.abs(flat), kind="stable")[:count]] = True
        found = smallest(tensors, count)
        assert [item.shape for item in found] == [item.shape for item in tensors]
        np.testing.assert_array_equal(torch.cat([item.flatten() for item in found]).numpy(), mask)


@pytest.mark.parametrize("wanted", [10_000, "60k", 81_440, 6.5e4])
def test_the_number_that_is_left_is_exact(alignment, wanted):
    """Whatever is 0 already: biases of a fresh GPT-2, weights of one that was pruned before. The tied head counts
    once, and ties of magnitude are no matter."""
    model = toy_gpt2()
    rewrite, made = _make(model, alignment, parameters=wanted)
    assert non_zero(made) == rewrite.parameters == {"60k": 60_000}.get(wanted, wanted)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter[::2] = 0
        for name in NAMES:
            model.get_parameter(name).mul_(50).round_().div_(50)
    if rewrite.parameters < non_zero(model):
        assert non_zero(apply([rewrite], model, alignment)) == rewrite.parameters
    else:
        with pytest.raises(UserError, match=r"and only .* of this model's are not 0"):
            apply([rewrite], model, alignment)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(original, alignment, dtype):
    cast = copy.deepcopy(original).to(dtype)
    made = apply([Pruned(parameters=50_000)], cast, alignment)
    assert non_zero(made) == 50_000 and {parameter.dtype for parameter in made.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({}, "give one, such as sparsity=0.5"),
        ({"sparsity": 0.5, "parameters": "60k"}, "parameters=60k, sparsity=0.5; give one"),
        ({"sparsity": 1.5}, "sparsity is 1.5; allowed: 0 to 1"),
        ({"parameters": "60kB"}, "pruned: parameters='60kB' is no number of parameters"),
        ({"parameters": 5}, "parameters=5 is out of reach; allowed: 7,712 to 81,440"),
        ({"parameters": 81_441}, "out of reach"),
        ({"n": 3}, "unknown key of pruned 'n'"),
    ],
)
def test_mistakes(record, said):
    with pytest.raises(UserError, match=said) as error:
        from_record({"rewrite": "pruned", **record}).check(toy_config())
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- recovery


@pytest.mark.parametrize("train", ["full", "lora", "auto"])
def test_recovery_leaves_the_zeros_at_0_and_measures_the_model_that_comes_out(original, alignment, train):
    rewrite, model = _make(original, alignment, sparsity=0.6)
    model = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    blocks, selection = (toy_blocks(model.config, rows=rows, seed=rows) for rows in (13, 5))
    assert resolve_train("auto", model, [rewrite]) == "lora"
    settings = {"steps": 6, "batch_tokens": 320, "learning_rate": 1e-2, "evaluate_every": 2, "autocast": "none"}
    done = finetune(model, blocks, selection, rewrites=[rewrite], train=train, **settings)
    assert done.best_step > 0
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name in NAMES:
        assert torch.equal(after[name] == 0, before[name] == 0), name
        assert not torch.equal(after[name], before[name]), name
    assert non_zero(model) == parameters(model) - round(0.6 * WEIGHTS)
    labels = selection.ids.masked_fill(~selection.mask, -100)
    with torch.no_grad():
        logits = model(selection.ids, attention_mask=selection.mask.long()).logits[:, :-1]
    nll = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).item()
    best = next(row for row in done.evaluations if row.step == done.best_step)
    assert best.nll == pytest.approx(nll, abs=1e-5)
    assert not any(parameter._backward_hooks for parameter in model.parameters())


def test_an_interrupted_recovery_of_a_pruned_model_goes_on_exactly(original, alignment, tmp_path):
    from compressor import artifacts
    from compressor.training_state import StateFolder

    rewrite, made = _make(original, alignment, sparsity=0.6)
    blocks = toy_blocks(made.config, rows=13, seed=13)
    settings = {"batch_tokens": 320, "learning_rate": 1e-2, "train": "full", "rewrites": [rewrite]}
    whole = copy.deepcopy(made)
    finetune(whole, blocks, None, steps=4, **settings)
    origin = artifacts.provenance(seed=0, base_model="toy", base_hash="toy", device="cpu", dtype="float32")
    state, part = StateFolder(tmp_path / "state", origin), copy.deepcopy(made)

    def stop(step):
        if step.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(part, blocks, None, steps=4, checkpoint_every=2, state_folder=state, progress=stop, **settings)
    again = copy.deepcopy(made)
    finetune(again, blocks, None, steps=4, checkpoint_every=2, state_folder=state, resume=True, **settings)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert non_zero(again) == non_zero(made)
