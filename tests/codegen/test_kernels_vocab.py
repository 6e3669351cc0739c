"""Vocab-parallel cross-entropy equals plain cross-entropy, on one rank and on several, in one collective and over the logits' own memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
from harness import run

from meshwright.codegen.kernels import vocab_parallel
from meshwright.codegen.kernels.vocab_parallel import cross_entropy, vocab_parallel_cross_entropy
from meshwright.codegen.runtime import loss as eager

CLASSES, ROWS = 1200, (2, 6)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return (torch.randn(*ROWS, CLASSES) * 4 + 3).to(dtype), torch.randint(0, CLASSES, ROWS)


def results(function: object, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    loss = function(leaf * 1, labels)  # type: ignore[operator]
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 1e-5), (torch.float16, 1e-3)])
@pytest.mark.parametrize("consume", [True, False])
def test_the_fused_loss_is_as_exact_as_eager(dtype: torch.dtype, eps: float, consume: bool) -> None:
    """Error against fp64 at most twice eager's, in the logits' dtype; two runs give equal bits."""
    logits, labels = (x.to(DEVICE) for x in batch(dtype))
    exact = results(eager_fp64, logits.double(), labels)
    plain = results(eager.cross_entropy, logits, labels)
    made, again = (results(lambda x, y: cross_entropy(x, y, consume=consume), logits, labels) for _ in range(2))
    assert made[1].dtype == dtype
    for a, b, e, r in zip(made, again, plain, exact, strict=True):
        assert torch.equal(a, b)
        assert (a.double() - r).abs().max() <= 2 * (e.double() - r).abs().max() + eps


def eager_fp64(output: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), labels.flatten())


def test_the_formula_without_triton_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither a GPU nor the interpreter is there."""
    logits, labels = batch()
    kernel = results(cross_entropy, logits, labels)
    monkeypatch.setattr(vocab_parallel, "INTERPRETED", False)
    assert vocab_parallel.available() == torch.cuda.is_available()
    formula = results(cross_entropy, logits, labels)
    for a, b in zip(kernel, formula, strict=True):
        assert torch.allclose(a, b, atol=1e-7)


def test_the_gradient_lies_where_the_logits_were() -> None:
    """consume=True takes no second tensor of logits; whoever saved them too is told by autograd."""
    logits, labels = (x.to(DEVICE) for x in batch())
    for consume in (True, False):
        leaf = logits.clone().requires_grad_()
        made = leaf * 1
        at: list[int] = []
        made.register_hook(lambda grad, at=at: at.append(grad.data_ptr()))
        cross_entropy(made, labels, consume=consume).backward()
        assert (at == [made.data_ptr()]) == consume
    leaf = logits.clone().requires_grad_()
    made = leaf * 1
    loss = made.exp().sum() * 0 + (made * made).sum() * 0 + cross_entropy(made, labels)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def on_rank(logits: Tensor, labels: Tensor) -> tuple[float, float, float, int]:
    """On every rank: loss, its difference to the eager vocab-parallel loss, the gradient's to plain cross-entropy, and collectives."""
    import torch.distributed as dist

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rank, n = mesh.get_local_rank(), CLASSES // mesh.size()
    mine = logits[..., rank * n : (rank + 1) * n].clone()
    called: list[str] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if str(function).startswith("_c10d_functional") and "wait" not in str(function) and "wrap" not in str(function):
                called.append(str(function))
            return function(*args, **(kwargs or {}))

    with Count():
        loss, grad = results(lambda x, y: vocab_parallel_cross_entropy(x, y, mesh), mine, labels)
    other, _ = results(lambda x, y: eager.vocab_parallel_cross_entropy(x, y, mesh), mine, labels)
    _, whole = results(eager.cross_entropy, logits, labels)
    error = (grad - whole[..., rank * n : (rank + 1) * n]).abs().max().item()
    return loss.item(), abs(loss - other).item(), error, len(called)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_agree_with_plain_cross_entropy_after_one_collective(world: int) -> None:
    """Classes split over 1, 2 and 4 ranks: loss and gradients of the whole, with at most one collective, none on one rank."""
    logits, labels = batch()
    wanted = eager.cross_entropy(logits, labels).item()
    for loss, against_eager, gradient, collectives in run(world, on_rank, logits, labels):
        assert abs(loss - wanted) <= 1e-6 * wanted
        assert against_eager <= 1e-6 * wanted
        assert gradient <= 1e-7
        assert collectives == (world > 1)


def test_the_loss_passes_through_fake_tensors_and_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(x, y)

    with FakeTensorMode():
        x = torch.empty(4, 16, dtype=torch.bfloat16, requires_grad=True)
        cross_entropy(x * 1, torch.zeros(4, dtype=torch.long)).backward()
        assert x.grad is not None
        assert x.grad.shape == (4, 16)
    exported = torch.export.export(Model(), (torch.empty(4, 16, device="meta"), torch.zeros(4, dtype=torch.long, device="meta")), strict=False)
    assert any("vocab_statistics" in str(n.target) for n in exported.graph.nodes)
