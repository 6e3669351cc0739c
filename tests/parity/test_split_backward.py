"""Gradients of weights that wait: equal to autograd's, summed in fp32 over microbatches, and nothing else held for them."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

sys.path.insert(0, str(Path(__file__).parent))
import models
from harness import run

from meshwright.codegen.apply import apply
from meshwright.codegen.runtime.split_backward import split_backward
from meshwright.planner.plan import Plan
from meshwright.planner.solve import plan
from meshwright.planner.space import parse_fix
from meshwright.profiling.cluster import parse_cluster
from meshwright.profiling.trace import trace

BATCH, WIDTH = 16, 8


class Block(nn.Module):
    """Linear modules of every kind, with what makes gradients pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(WIDTH, 3 * WIDTH, bias=False), Conv1D(WIDTH, 3 * WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def test_weights_wait_and_get_what_autograd_gives() -> None:
    """Two microbatches: weights of linear modules have no gradient until each one's turn, all others at once."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    batches = [torch.randn(2, 4, WIDTH) for _ in range(2)]
    for x in batches:
        model(x).square().sum().backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for p in model.parameters():
        p.grad = None
    split_backward(model, model)
    runs = []
    for x in batches:
        model(x).square().sum().backward()
        runs.append(model.weight_gradients())  # type: ignore[operator]
    held = {n for n, p in model.named_parameters() if p.grad is not None}
    assert held == {n for n in wanted if "norm" in n or "bias" in n}
    for finish in runs:
        finish()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-6, atol=1e-6)


def test_only_what_a_weight_needs_is_held() -> None:
    """After the first half: of each linear module its input and the gradient of its output, and no other tensor of the microbatch."""
    model = nn.Sequential(Block())
    split_backward(model, model)

    def floats() -> int:
        gc.collect()
        own = {p.data_ptr() for p in model.parameters()}
        return sum(t.numel() for t in {x.data_ptr(): x for x in gc.get_objects() if type(x) is Tensor}.values() if t.data_ptr() not in own)

    x = torch.randn(2, 4, WIDTH)
    before = floats()
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        if "norm" in name or "bias" in name:
            p.grad = None
    finish = model.weight_gradients()  # type: ignore[operator]
    rows = 2 * 4
    assert floats() - before == rows * (WIDTH + 3 * WIDTH) + rows * (3 * WIDTH + WIDTH)  # up's and down's
    finish()


def _gradients(plans: list[Plan], source: str) -> list[dict[str, np.ndarray]]:
    found = []
    for made in plans:
        parallel = apply(made, models.build(source))
        inputs, labels = models.make_batch(trace(source, seq=models.SEQ, precision="bf16"), BATCH)
        parallel.train_step(inputs, labels)
        found.append({n: g.numpy() for n, g in parallel.full_gradients().items()})
    return found


@pytest.mark.parametrize("schedule", ["zero-bubble", "zbv"])
def test_gradients_in_bf16_are_summed_in_fp32(schedule: str, tmp_path: Path) -> None:
    """Sixteen microbatches in bf16: the sums are those of 1F1B, whose backward is whole; sums in bf16 differ by thousandths."""
    source = models.write_models(tmp_path)["llama"]
    graph = trace(source, seq=models.SEQ, precision="bf16")
    plans = []
    for how in ("1f1b", schedule):
        fixed = parse_fix(f"pp=2,tp=1,dp=1,zero=0,micro_batch=1,recompute=none,loss=plain,schedule={how}")
        plans.append(plan(graph, parse_cluster("2xcpu"), global_batch=BATCH, seq=models.SEQ, precision="bf16", fix=fixed))
    found = [x for ranks in zip(*run(2, _gradients, plans, source), strict=True) for x in ranks]
    whole, split = ({n: g for rank in found[i : i + 2] for n, g in rank.items()} for i in (0, 2))
    assert whole.keys() == split.keys()
    for name, g in whole.items():
        assert np.abs(split[name] - g).max() <= 2e-5 * np.abs(g).max(), name
