"""The loss of groups against sums of probabilities by autograd, and what it does to a recovery."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from test_matryoshka import nested
from toy import toy_blocks

from compressor import group_loss, training_loss
from compressor.artifacts import provenance
from compressor.embedding_clusters import emergent_groups
from compressor.errors import UserError
from compressor.finetune import StateFolder, finetune
from compressor.group_loss import HierarchyLoss, group_losses
from compressor.modeling.nesting import size_of
from compressor.nested_training import NestedObjective
from compressor.rewrites.hierarchy import Emergent, Imposed
from compressor.token_groups import imposed_groups

STRINGS = [None, *(f"{blank}{word}" for blank in ("", " ") for word in ("a", "B", "CD", "7", ".", "\n"))]
STRINGS = (STRINGS * 8)[:97]
EMERGENT = {"kind": "emergent", "weight": 0.5, "minimum_similarity": 0.3, "minimum_group_size": 2, "every": 2}


def made(groups, **more):
    joint = {"train": "joint", "inner": 0.5}
    return nested({"ffn": None, "head": [16, 8], "groups": groups, **joint, **more})


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("groups", [[0, 0, 1, -1, 1, 0, -1, 2, 2, 1, 0], [-1] * 11, [0] * 11])
@pytest.mark.parametrize("least_rows", [256, 3])
def test_it_is_minus_log_of_the_sum_of_probabilities(groups, least_rows, monkeypatch):
    monkeypatch.setattr(training_loss, "_LEAST_ROWS", least_rows)
    monkeypatch.setattr(training_loss, "_LOGITS_AT_ONCE", {"cpu": 1})
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (20,), generator=generator)
    loss = group_losses(hidden, weight, targets, torch.tensor(groups))
    likely = (hidden @ weight.T).softmax(1)
    expected = 0
    for row, target in enumerate(targets.tolist()):
        own = [v for v, group in enumerate(groups) if v == target or (group >= 0 and group == groups[target])]
        expected = expected - torch.log(sum(likely[row, v] for v in own))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-12)
    scaled = torch.autograd.grad(3 * loss, [hidden, weight])
    wanted = torch.autograd.grad(3 * expected, [hidden, weight])
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(scaled, wanted, strict=True))


def test_very_unlikely_groups_stay_finite():
    hidden = torch.tensor([[200.0]], requires_grad=True)
    loss = group_losses(hidden, torch.tensor([[1.0], [-1.0], [-1.0]]), torch.tensor([2]), torch.tensor([0, 1, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(400 - math.log(2)) and hidden.grad.item() == pytest.approx(2)


def test_a_frozen_head_gets_no_gradient():
    hidden = torch.randn(5, 4, requires_grad=True)
    group_losses(hidden, torch.randn(7, 4), torch.arange(5), torch.zeros(7, dtype=torch.int64) - 1).backward()
    assert hidden.grad.abs().sum() > 0


# ---------------------------------------------------------------- in the loss of a nested model


@pytest.mark.parametrize("kind", ["imposed", "emergent", "by prefix"])
def test_every_prefix_learns_its_groups(kind):
    settings = {"kind": "imposed", "scheme": "case", "weight": 0.5} if kind == "imposed" else EMERGENT
    if kind == "by prefix":
        settings = {"kind": "imposed", "scheme": ["form", "kind", "word_start"], "weight": 0.5}
    rewrite, _, model = made(settings, width=[16])
    nest = rewrite.nest(model)
    ids = torch.randint(1, 97, (3, 20), generator=torch.Generator().manual_seed(5))
    losses = []
    for groups in (nest.groups, None):
        asked = dataclasses.replace(nest, groups=groups)
        objective = NestedObjective(model, None, 0.0, (), None, nest=asked, seed=0, strings=STRINGS)
        objective.begin_step(0)
        losses.append(objective(ids, None, False)[0].item())
    schemes = {16: "form", 15: "kind", 8: "word_start"}
    expected, embeddings = 0.0, model.transformer.wte.weight.detach()
    for choice, prefix in (({"head": 16}, 16), ({"head": 8}, 8), ({"width": 16}, 15)):
        if kind == "emergent":
            own = emergent_groups(embeddings[:, :prefix], minimum_similarity=0.3, minimum_group_size=2)
            assert (own >= 0).any()
        else:
            own = imposed_groups(STRINGS, "case" if kind == "imposed" else schemes[prefix])[0]
        with torch.no_grad():
            likely = model.slice(**choice)(ids).logits[:, :-1].double().softmax(-1).flatten(0, 1)
        for row, target in zip(likely, ids[:, 1:].flatten(), strict=True):
            same = (own == own[target]) if own[target] >= 0 else torch.arange(97) == target
            expected -= 0.5 * row[same].sum().log().item()
    assert losses[0] - losses[1] == pytest.approx(expected / len(nest.sizes), rel=1e-4)


def recovered(groups, train="full", steps=3, strings=STRINGS, **more):
    rewrite, original, model = made(groups)
    blocks = toy_blocks(original.config)
    given = {"rewrites": [rewrite], "train": train, "steps": steps, "batch_tokens": 256, "learning_rate": 3e-3}
    result = finetune(model, blocks, blocks, strings=strings, evaluate_every=steps, **given, **more)
    return model.state_dict(), result


def test_weight_0_changes_no_bit():
    (plain, _), (idle, _), (weighted, _) = (
        recovered(groups)
        for groups in (None, {**EMERGENT, "weight": 0}, {"kind": "imposed", "scheme": "kind", "weight": 0.5})
    )
    assert all(torch.equal(value, idle[key]) for key, value in plain.items())
    assert any(not torch.equal(value, weighted[key]) for key, value in plain.items())


def test_emergent_groups_follow_the_embeddings():
    sizes = [size_of(made(None)[2].config, head=8)]
    loss = HierarchyLoss(Emergent(minimum_similarity=0.8, every=2), sizes, 32, None)
    generator = torch.Generator().manual_seed(0)
    seen = []
    for step in range(5):
        loss.begin_step(step, torch.randn(97, 32, generator=generator).requires_grad_())
        seen.append(loss.groups[8])
    assert seen[0] is seen[1] and seen[2] is seen[3] and not torch.equal(seen[0], seen[2]) and seen[4] is not seen[2]
    frozen = torch.randn(97, 32, generator=generator)
    loss.begin_step(6, frozen)
    assert loss.groups[8] is seen[4]  # nothing that could have changed


@pytest.mark.parametrize(("train", "searches"), [("full", 3), ("lora", 1)])
def test_a_recovery_finds_groups_anew_where_embeddings_are_trained(train, searches, monkeypatch):
    found = []

    def search(embeddings, **settings):
        found.append(embeddings.shape[1])
        return emergent_groups(embeddings, **settings)

    monkeypatch.setattr(group_loss, "emergent_groups", search)
    recovered(EMERGENT, train, steps=5)  # every 2: before steps 0, 2 and 4
    assert len(found) == searches * len(set(found))


@pytest.mark.parametrize("train", ["full", "lora"])
def test_an_interrupted_recovery_goes_on_with_its_groups(train, tmp_path):
    """The state lies between two searches for groups, and the embeddings have moved since the first."""
    origin = provenance(seed=0, base_model="toy", base_hash="0", data={}, device="cpu", dtype="float32")
    folder = StateFolder(tmp_path / "state", origin)
    groups = {**EMERGENT, "every": 4, "weight": 3.0}

    def halt(step):
        if step.step == 7:
            raise KeyboardInterrupt

    straight, _ = recovered(groups, train, steps=8)
    with pytest.raises(KeyboardInterrupt):
        recovered(groups, train, steps=8, state_folder=folder, checkpoint_every=6, progress=halt)
    resumed, _ = recovered(groups, train, steps=8, state_folder=folder, resume=True)
    assert all(torch.equal(value, resumed[key]) for key, value in straight.items())


def test_imposed_groups_need_strings():
    with pytest.raises(UserError, match="tokenizer") as error:
        HierarchyLoss(Imposed(), [size_of(made(None)[2].config, head=8)], 32, None)
    assert "\n" not in str(error.value)
