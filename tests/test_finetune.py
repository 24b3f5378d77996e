"""finetune against a loop written out in full; interruptions; processes; what must not change."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from toy import toy_alignment, toy_blocks, toy_gpt2
from transformers import GPT2LMHeadModel

import compressor
from compressor import artifacts, lora, training_loop, training_loss, training_state
from compressor.data import TokenBlocks
from compressor.errors import UserError
from compressor.finetune import control_train, finetune, resolve_train
from compressor.rewrites import Rewrite
from compressor.rewrites.alibi import Alibi
from compressor.rewrites.compose import apply
from compressor.rewrites.fractal import Fractal
from compressor.rewrites.matryoshka import Matryoshka
from compressor.rewrites.soft_shared import SoftShared
from compressor.training_schedule import batch_rows
from compressor.training_state import StateFolder

SETTINGS = {"steps": 6, "batch_tokens": 5 * 64, "seed": 3, "evaluate_every": 2}


@pytest.fixture(scope="module")
def made() -> tuple[GPT2LMHeadModel, GPT2LMHeadModel, SoftShared]:
    original = toy_gpt2()
    rewrite = SoftShared(n=3, start=1, rank=4, delta_init="svd").resolved(original.config)
    return original, apply([rewrite], original, toy_alignment(original)), rewrite


@pytest.fixture
def original(made) -> GPT2LMHeadModel:
    return copy.deepcopy(made[0])


@pytest.fixture
def rewritten(made) -> GPT2LMHeadModel:
    return copy.deepcopy(made[1])


@pytest.fixture
def rewrites(made) -> list[SoftShared]:
    return [made[2]]


@pytest.fixture
def blocks(made) -> TokenBlocks:
    """13 rows, the last one half pads: every third batch of five or so holds them."""
    return toy_blocks(made[0].config, rows=13, seed=7)


@pytest.fixture
def selection(made) -> TokenBlocks:
    return toy_blocks(made[0].config, rows=5, seed=8)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def brute_force_nll(model: GPT2LMHeadModel, blocks: TokenBlocks) -> float:
    with torch.no_grad():
        logits = model(blocks.ids, attention_mask=blocks.mask.long()).logits[:, :-1]
    labels = blocks.ids[:, 1:].masked_fill(~blocks.mask[:, 1:], -100)
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()


# ---------------------------------------------------------------- the loss and the steps


@pytest.mark.parametrize("forward_tokens", [64, 128, 10_000], ids=["row by row", "two rows", "at once"])
@pytest.mark.parametrize("distilled", [False, True], ids=["next tokens", "distilled"])
def test_every_step_is_that_of_a_loop_written_out_in_full(
    original, rewritten, rewrites, blocks, forward_tokens, distilled
):
    """Full logits, labels of -100, torch's own optimiser and schedule, float64."""
    teacher = original.double() if distilled else None
    reference = copy.deepcopy(rewritten).double()
    result = finetune(
        rewritten.double(), blocks, None, rewrites=rewrites, **SETTINGS, train="deltas", penalty=0.1, warm_up=2,
        learning_rate=0.01, weight_decay=0.1, clip=0.02, teacher=teacher, mix=0.7, autocast="none",
        forward_tokens=forward_tokens,
    )  # fmt: skip

    (rewrite,) = rewrites
    chosen = rewrite.trainable(reference)
    optimizer = torch.optim.AdamW(chosen, lr=0.01, weight_decay=0.1)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[2])
    seen = 0
    for step, row in enumerate(result.curve):
        rows = batch_rows(13, 5, step, seed=3)
        ids, mask = blocks.ids[rows], blocks.mask[rows]
        logits = reference(ids, attention_mask=mask.long()).logits[:, :-1].flatten(0, 1)
        labels = ids[:, 1:].masked_fill(~mask[:, 1:], -100).flatten()
        nll = functional.cross_entropy(logits, labels)
        loss = nll
        if teacher is not None:
            with torch.no_grad():
                wanted = teacher(ids).logits[:, :-1].flatten(0, 1)[labels != -100].log_softmax(-1)
            own = logits[labels != -100].log_softmax(-1)
            divergence = functional.kl_div(own, wanted, reduction="batchmean", log_target=True)
            loss = 0.3 * nll + 0.7 * divergence
            assert row.divergence == pytest.approx(divergence.item(), rel=1e-9)
        penalty = rewrite.penalty(reference)
        optimizer.zero_grad()
        (loss + 0.1 * penalty).backward()
        assert row.step == step + 1 and row.nll == pytest.approx(nll.item(), rel=1e-9)
        assert row.penalty == pytest.approx(penalty.item(), rel=1e-9)
        assert row.learning_rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        norm = nn.utils.clip_grad_norm_(chosen, 0.02)
        assert norm > 0.02, "clipping is never tested"
        assert row.gradient_norm == pytest.approx(norm.item(), rel=1e-9)
        optimizer.step()
        schedule.step()
        seen += int((labels != -100).sum())
    assert result.tokens == seen and result.trainable == sum(parameter.numel() for parameter in chosen)
    found, expected = rewritten.state_dict(), reference.state_dict()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)


def test_evaluations_are_exact_and_the_best_state_stays(rewritten, rewrites, blocks, selection):
    start = brute_force_nll(rewritten, selection)
    result = finetune(rewritten, blocks, selection, rewrites=rewrites, **SETTINGS, train="full", learning_rate=3e-3)
    assert [item.step for item in result.evaluations] == [0, 2, 4, 6]
    assert result.evaluations[0].nll == pytest.approx(start, rel=1e-5)
    assert result.evaluations[0].tokens == int(selection.mask[:, 1:].sum())
    best = min(result.evaluations, key=lambda item: item.nll)
    assert result.best_step == best.step
    assert brute_force_nll(rewritten, selection) == pytest.approx(best.nll, rel=1e-5)


@pytest.fixture
def judged(monkeypatch):
    """Evaluations that say what they are told; returns the states that they saw."""

    def plant(values):
        left, states = iter(values), []

        def judge(self, blocks):
            states.append(tensors(self.model))
            return next(left), 1

        monkeypatch.setattr(training_loop.Loop, "_selection_nll", judge)
        return states

    return plant


@pytest.mark.parametrize("train", ["deltas", "lora", "full"])
def test_a_training_that_only_harms_changes_no_bit(rewritten, rewrites, blocks, selection, train, judged):
    judged([1.0, 1.0, 1.5, 1.2])
    before = tensors(rewritten)
    result = finetune(rewritten, blocks, selection, rewrites=rewrites, **SETTINGS, train=train)
    assert result.best_step == 0 and same_bits(tensors(rewritten), before)


def test_the_best_state_is_kept_in_all_its_bits(rewritten, rewrites, blocks, selection, judged):
    states = judged([2.0, 1.5, 0.5, 0.7])
    result = finetune(rewritten, blocks, selection, rewrites=rewrites, **SETTINGS)
    assert result.best_step == 4 and same_bits(tensors(rewritten), states[2])
    assert not same_bits(states[2], states[3])


def test_without_selection_text_the_last_state_stays(original, blocks):
    before = tensors(original)
    result = finetune(original, blocks, None, **SETTINGS, train="full", learning_rate=5.0)
    assert result.best_step == 6 and result.evaluations == () and not same_bits(tensors(original), before)


def test_it_learns_what_can_be_learnt():
    """Each token fixes the next; a few steps find much of it, in every mode."""
    successor = torch.randperm(97, generator=torch.Generator().manual_seed(0))
    ids = torch.empty(40, 64, dtype=torch.int64)
    ids[:, 0] = torch.arange(40)
    for column in range(1, 64):
        ids[:, column] = successor[ids[:, column - 1]]
    text = TokenBlocks(ids, torch.ones_like(ids, dtype=torch.bool), "planted", "training", "planted")
    for train, reached in (("full", 0.7), ("lora", 0.8)):
        model = toy_gpt2(seed=1)
        result = finetune(model, text, text, train=train, steps=25, batch_tokens=512, learning_rate=2e-2)
        assert result.best_step == 25
        assert result.evaluations[-1].nll < reached * result.evaluations[0].nll, train


# ---------------------------------------------------------------- what is trained


def test_deltas_change_and_nothing_else_by_a_bit(rewritten, rewrites, blocks):
    before = tensors(rewritten)
    result = finetune(rewritten, blocks, None, rewrites=rewrites, **SETTINGS)
    after = tensors(rewritten)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert result.train == "deltas" and changed == {name for name in before if "delta_" in name}
    assert after.keys() == before.keys()


@pytest.mark.parametrize("model", ["original", "rewritten"])
def test_lora_leaves_the_structure_and_all_but_the_linears(request, blocks, model):
    model = request.getfixturevalue(model)
    modules = [(name, type(module)) for name, module in model.named_modules()]
    before = tensors(model)
    result = finetune(model, blocks, None, **SETTINGS, rank=2)
    after = tensors(model)
    assert result.train == "lora" and [(name, type(m)) for name, m in model.named_modules()] == modules
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert after.keys() == before.keys()
    linears = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    assert changed == {name for name in before if name.endswith(linears)}
    assert all(parameter.requires_grad for parameter in model.parameters()) and not model.training


def test_full_trains_all(original, blocks):
    before = tensors(original)
    result = finetune(original, blocks, None, **SETTINGS, train="full")
    assert result.trainable == sum(parameter.numel() for parameter in original.parameters())
    assert not any(torch.equal(before[name], tensor) for name, tensor in original.state_dict().items())


def test_which_mode(original, rewritten, rewrites):
    assert resolve_train("auto", rewritten, rewrites) == "deltas"
    assert resolve_train("auto", rewritten, []) == resolve_train("auto", original, []) == "lora"
    assert resolve_train("full", rewritten, rewrites) == "full"
    assert [control_train(train) for train in ("auto", "deltas", "lora", "full")] == ["auto", "auto", "lora", "full"]
    with pytest.raises(UserError, match="train is 'deltas', and this model has none"):
        resolve_train("deltas", original, [])
    with pytest.raises(UserError, match="unknown train 'delta'"):
        resolve_train("delta", rewritten, rewrites)


def test_the_control_sees_the_same_batches(original, rewritten, rewrites, blocks, monkeypatch):
    seen: list[list[torch.Tensor]] = []
    forward = training_loss.TokenObjective.forward

    def watched(self, ids, mask, with_penalty):
        seen[-1].append(ids)
        return forward(self, ids, mask, with_penalty)

    monkeypatch.setattr(training_loss.TokenObjective, "forward", watched)
    for model, some in ((rewritten, rewrites), (original, [])):
        seen.append([])
        finetune(model, blocks, None, rewrites=some, **SETTINGS)
    assert len(seen[0]) == 6 and all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert len({ids.tobytes() for ids in (batch.numpy() for batch in seen[0])}) == 6


@dataclasses.dataclass(frozen=True)
class Annealed(SoftShared):
    """Writes down when it is called."""

    def on_step(self, model, progress):
        model.progress = [*getattr(model, "progress", []), progress]


def test_annealing_runs_from_0_to_1_and_its_end_is_kept(rewritten, rewrites, blocks, selection, judged):
    judged([0.5, 1.0, 2.0, 3.0])
    annealed = Annealed(**dataclasses.asdict(rewrites[0]))
    result = finetune(rewritten, blocks, selection, rewrites=[annealed], **SETTINGS)
    assert rewritten.progress == [0, 0.2, 0.4, 0.6, 0.8, 1] and result.best_step == 6


# ---------------------------------------------------------------- interruptions


class Stop(BaseException):
    """A kill."""


def state_folder(path: Path) -> StateFolder:
    origin = artifacts.provenance(seed=0, base_model="m", base_hash="h", device="cpu", dtype="float32")
    return StateFolder(path, origin)


CASES = {
    "deltas": {"train": "deltas"},
    "lora": {"train": "lora", "rank": 2},
    "full, dropout": {"train": "full", "dropout": True},
    "float32": {"train": "deltas", "autocast": "none"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(made, blocks, selection, tmp_path, case):
    original = toy_gpt2(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1) if "dropout" in case else made[1]
    rewrites = [] if "dropout" in case else [made[2]]

    def run(folder, stop_after=99, **more):
        model = copy.deepcopy(original)
        torch.manual_seed(hash(folder) % 1000)  # whatever the state of the global generator is

        def progress(step):
            if step.step > stop_after:
                raise Stop

        settings = {**SETTINGS, "steps": 7, "learning_rate": 0.02, **CASES[case]}
        result = finetune(model, blocks, selection, rewrites=rewrites, **settings, state_folder=state_folder(folder),
                          checkpoint_every=2, progress=progress, **more)  # fmt: skip
        return model, result

    whole_model, whole = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "broken", stop_after=3)  # steps 3 and 4 are lost
    with pytest.raises(Stop):
        run(tmp_path / "broken", stop_after=6, resume=True)
    model, result = run(tmp_path / "broken", resume=True)
    assert same_bits(tensors(model), tensors(whole_model))
    for name in ("curve", "evaluations", "best_step", "tokens", "trainable", "settings"):
        assert getattr(result, name) == getattr(whole, name), name
    again, repeated = run(tmp_path / "broken", resume=True)  # the caller could not save: nothing is trained again
    assert same_bits(tensors(again), tensors(model)) and repeated.training_seconds == result.training_seconds
    training_state.remove(state_folder(tmp_path / "broken"))
    assert not (tmp_path / "broken").exists()


def test_killed_between_the_tensors_and_the_facts(made, blocks, selection, tmp_path, monkeypatch):
    def run(folder, **more):
        model = copy.deepcopy(made[1])
        result = finetune(model, blocks, selection, rewrites=[made[2]], **SETTINGS, checkpoint_every=2,
                          state_folder=state_folder(folder), **more)  # fmt: skip
        return tensors(model), result.curve

    expected = run(tmp_path / "whole")
    written = artifacts.write_json

    def killed(path, kind, body, origin):
        if body["step"] == 4:
            raise Stop
        written(path, kind, body, origin)

    monkeypatch.setattr(artifacts, "write_json", killed)
    monkeypatch.setattr(artifacts.shutil, "rmtree", lambda *arguments, **named: None)  # a kill tidies nothing up
    with pytest.raises(Stop):
        run(tmp_path / "broken")
    monkeypatch.undo()
    assert any((tmp_path / "broken").glob(".*/state.safetensors")), "the tensors of step 4 are there"
    found = run(tmp_path / "broken", resume=True)
    assert same_bits(found[0], expected[0]) and found[1] == expected[1]


def test_a_stored_state_needs_the_same_settings_and_is_left_aside_without_resume(original, blocks, tmp_path):
    folder = state_folder(tmp_path / "state")
    kept = {"state_folder": folder, "checkpoint_every": 2}
    finetune(original, blocks, None, **SETTINGS, **kept)
    with pytest.raises(UserError, match=r"learning_rate=0\.001, now it is 0\.5"):
        finetune(original, blocks, None, **SETTINGS, **kept, learning_rate=0.5, resume=True)
    assert lora.adapters(original) == []
    assert len(finetune(original, blocks, None, **SETTINGS, **kept, learning_rate=0.5).curve) == 6


# ---------------------------------------------------------------- refusals


def test_a_diverged_training_says_where_and_drops_its_adapters(original, blocks, selection):
    with pytest.raises(UserError, match=r"at step \d is not a finite number with learning_rate=1e\+38") as raised:
        finetune(original, blocks, selection, **{**SETTINGS, "evaluate_every": 6}, learning_rate=1e38)
    assert "\n" not in str(raised.value) and lora.adapters(original) == []


def test_models_that_cannot_be_trained(original, blocks):
    launch = "start `accelerate launch"
    with pytest.raises(UserError, match=f"wrapped in DataParallel.*{launch}"):
        finetune(nn.DataParallel(original), blocks, None)
    spread = copy.deepcopy(original)
    spread.transformer.h[3].to("meta")
    with pytest.raises(UserError, match=f"spread over several devices.*{launch}"):
        finetune(spread, blocks, None)
    with pytest.raises(UserError, match="float32 weights, these are bfloat16"):
        finetune(copy.deepcopy(original).bfloat16(), blocks, None)
    with pytest.raises(UserError, match="teacher has 90 tokens, the model 97"):
        finetune(original, blocks, None, teacher=toy_gpt2(vocab_size=90))
    with pytest.raises(ValueError, match="shares memory"):
        finetune(original, blocks, None, teacher=original)


def test_deltas_may_learn_from_the_model_that_lent_them_its_other_weights(blocks):
    original = toy_gpt2()
    original.train()
    rewrite = SoftShared(n=3, start=1, rank=4, delta_init="svd").resolved(original.config)
    model = apply([rewrite], original, toy_alignment(original))
    before = tensors(original)
    result = finetune(model, blocks, None, rewrites=[rewrite], **SETTINGS, teacher=original)
    assert result.curve[-1].divergence < result.curve[0].divergence
    assert same_bits(tensors(original), before) and original.training and not model.training
    with pytest.raises(ValueError, match="shares memory"):
        finetune(model, blocks, None, rewrites=[rewrite], **SETTINGS, teacher=original, train="full")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("steps", 0, "1 or more"),
        ("batch_tokens", 0, "1 or more"),
        ("evaluate_every", 0, "1 or more"),
        ("forward_tokens", -1, "1 or more"),
        ("learning_rate", -1.0, "0 or more"),
        ("penalty", float("nan"), "0 or more"),
        ("clip", -1.0, "0 or more"),
    ],
)
def test_settings_out_of_range(original, blocks, name, value, allowed):
    with pytest.raises(UserError, match=f"^{name} is .*; allowed: {allowed}"):
        finetune(original, blocks, None, **{**SETTINGS, name: value})


def test_text_without_a_token_to_predict(original):
    nothing = TokenBlocks(
        torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.bool), "x", "training", ""
    )
    with pytest.raises(UserError, match="no token to predict"):
        finetune(original, nothing, None)


def test_one_of_many_processes_that_accelerate_does_not_know(original, blocks, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"one of 2 processes, but accelerate sees 1.*ACCELERATE_USE_CPU"):
        finetune(original, blocks, None, **SETTINGS)


# ---------------------------------------------------------------- two processes

SCRIPT = """
import dataclasses, json, sys
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from test_finetune import DISTRIBUTED, distributed

out = sys.argv[1]
for name in DISTRIBUTED:
    model, result = distributed(name, f"{out}/{name}")
    assert result.settings["processes"] == Accelerator().num_processes == 2
    if Accelerator().is_main_process:
        save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items() if key != "lm_head.weight"},
                  f"{out}/{name}.safetensors")
        with open(f"{out}/{name}.json", "w") as file:
            json.dump({"curve": [dataclasses.asdict(row) for row in result.curve], "best": result.best_step,
                       "evaluations": [row.nll for row in result.evaluations], "tokens": result.tokens}, file)
"""

DISTRIBUTED = {
    "accumulated": {"batch_tokens": 5 * 64, "forward_tokens": 64, "penalty": 0.1},  # 3 rows and 2 rows
    "one_row": {"batch_tokens": 64, "train": "lora"},  # the second process has none
    "distilled": {"batch_tokens": 4 * 64, "train": "full", "teacher": True, "mix": 0.5},
    "annealed": {"batch_tokens": 4 * 64, "train": "full"},  # the first step leaves some out, the last ones others
    "nested": {"batch_tokens": 5 * 64, "forward_tokens": 2 * 64, "train": "full"},  # three of five sizes a step
    "divided": {"batch_tokens": 3 * 64, "train": "lora", "teacher": True, "mix": 0.5},  # not all have rows in both
}
MODELS_IN_ONE: dict[str, Rewrite] = {
    "nested": Matryoshka(ffn=[0.5, 0.25], depth=[3], head=[16], train="sandwich", inner=0.5),
    "divided": Fractal(inner=0.5, stream="cluster"),
}


def distributed(name: str, folder: str):
    """The same training, whoever calls it."""
    torch.set_num_threads(1)
    original = toy_gpt2()
    rewrite: Rewrite = SoftShared(n=3, start=1, rank=4, delta_init="svd").resolved(original.config)
    if name == "annealed":
        rewrite = Alibi(slopes="learned")
    if name in MODELS_IN_ONE:
        rewrite = MODELS_IN_ONE[name].resolved(original.config)
    model = apply([rewrite], original, toy_alignment(original), calibration=toy_blocks(original.config, rows=4))
    case = dict(DISTRIBUTED[name])
    if case.pop("teacher", False):
        case["teacher"] = toy_gpt2()
        model = copy.deepcopy(model)
    result = finetune(
        model, toy_blocks(original.config, rows=13, seed=7), toy_blocks(original.config, rows=5, seed=8),
        rewrites=[rewrite], steps=4, evaluate_every=2, learning_rate=0.01, autocast="none", checkpoint_every=2,
        state_folder=state_folder(Path(folder)), **case,
    )  # fmt: skip
    return model, result


def test_two_processes_make_the_steps_of_one(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    here = Path(__file__).parent
    paths = [str(Path(compressor.__file__).parent.parent), str(here)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1",
                   "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    # --cpu would start one process only: accelerate leaves several on CPUs to MPI, or to torchrun as --multi_gpu does
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in DISTRIBUTED:
        both = json.loads((tmp_path / f"{name}.json").read_text())
        model, alone = distributed(name, str(tmp_path / f"alone-{name}"))
        for row, expected in zip(both["curve"], alone.curve, strict=True):
            assert (row["divergence"] is None) == (name in ("accumulated", "one_row", "annealed"))
            for field in ("nll", "gradient_norm", *(["divergence"] if row["divergence"] is not None else [])):
                assert row[field] == pytest.approx(getattr(expected, field), rel=1e-4), (name, row["step"], field)
        assert both["evaluations"] == pytest.approx([row.nll for row in alone.evaluations], rel=1e-4)
        assert both["best"] == alone.best_step and both["tokens"] == alone.tokens
        weights = artifacts.read_tensors(tmp_path / f"{name}.safetensors", "test")
        for key, tensor in weights.items():
            torch.testing.assert_close(tensor, model.state_dict()[key], rtol=0, atol=2e-3)
