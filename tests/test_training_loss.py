"""The training loss against torch's own, written out in full."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from compressor import training_loss
from compressor.training_loss import token_losses

N, D, V = 23, 7, 31


def inputs(teacher: bool, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    hidden, weight = draw(N, D).requires_grad_(), draw(V, D).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    other = {"teacher_hidden": draw(N, 5), "teacher_weight": draw(V, 5)} if teacher else {}
    return hidden, weight, targets, other


@pytest.fixture(params=[4, 1000], ids=["in slices", "at once"])
def slices(request, monkeypatch):
    monkeypatch.setattr(training_loss, "_LEAST_ROWS", request.param)
    monkeypatch.setattr(training_loss, "_LOGITS_AT_ONCE", {"cpu": 1})


@pytest.mark.parametrize(("mix", "teacher"), [(0.0, False), (0.0, True), (0.3, True), (1.0, True)])
@pytest.mark.parametrize("frozen", [False, True])
def test_loss_and_gradients_are_those_of_torch(slices, mix, teacher, frozen):
    hidden, weight, targets, other = inputs(teacher)
    weight.requires_grad_(not frozen)
    loss, sums = token_losses(hidden, weight, targets, mix=mix, **other)
    (3 * loss).backward()  # 3: the gradient that comes from above is used
    mine = hidden.grad.clone(), None if frozen else weight.grad.clone()
    hidden.grad = weight.grad = None

    logits = hidden @ weight.T
    nll = functional.cross_entropy(logits, targets, reduction="sum")
    divergence = torch.zeros(())
    if teacher:
        wanted = (other["teacher_hidden"] @ other["teacher_weight"].T).softmax(-1)
        divergence = functional.kl_div(logits.log_softmax(-1), wanted, reduction="sum")
    (3 * ((1 - mix) * nll + mix * divergence)).backward()
    torch.testing.assert_close(loss, (1 - mix) * nll + mix * divergence)
    torch.testing.assert_close(sums, torch.stack([nll, divergence.to(nll)]))
    torch.testing.assert_close(mine[0], hidden.grad)
    if frozen:
        assert mine[1] is None
    else:
        torch.testing.assert_close(mine[1], weight.grad)


def test_bfloat16_products_come_near():
    hidden, weight, targets, other = inputs(True, torch.float32)
    exact, _ = token_losses(hidden, weight, targets, mix=0.5, **other)
    near, sums = token_losses(hidden, weight, targets, mix=0.5, dtype=torch.bfloat16, **other)
    near.backward()
    assert sums.dtype == hidden.grad.dtype == torch.float32
    assert 0 < abs(near.item() - exact.item()) < 0.02 * exact.item()


def test_no_position_no_loss():
    hidden, weight, targets, _ = inputs(False)
    loss, sums = token_losses(hidden[:0], weight, targets[:0])
    loss.backward()
    assert loss.item() == 0 and sums.tolist() == [0, 0] and weight.grad.abs().max() == 0


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_all_logits_are_never_there_together(monkeypatch):
    monkeypatch.setattr(training_loss, "_LEAST_ROWS", 8)
    monkeypatch.setattr(training_loss, "_LOGITS_AT_ONCE", {"cpu": 1})
    hidden, weight = torch.randn(512, 4, requires_grad=True), torch.randn(300, 4, requires_grad=True)
    with Largest() as largest:
        loss, _ = token_losses(hidden, weight, torch.zeros(512, dtype=torch.int64))
        loss.backward()
    assert largest.elements <= max(8 * 300, 512 * 4)


def test_a_mix_needs_a_teacher():
    hidden, weight, targets, _ = inputs(False)
    with pytest.raises(ValueError, match="without a teacher"):
        token_losses(hidden, weight, targets, mix=0.5)
