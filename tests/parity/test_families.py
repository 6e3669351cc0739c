"""Each family of models is split as far as it can be: what cannot be is whole on every rank, and the plan says so; what a degree would need
and the model has not is refused in a sentence."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from harness import run
from matrix import BATCH
from models import SEQ, make_batch, write_models

from meshwright.codegen.apply import apply
from meshwright.planner.plan import Plan
from meshwright.planner.solve import plan
from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import ModelGraph
from meshwright.profiling.loading import import_target
from meshwright.profiling.trace import trace

ODD = '''"""Layers with an op that no sharding rule knows."""

import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.act, self.down = nn.LayerNorm(16), nn.Linear(16, 32), Smooth(), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(x))))


class Smooth(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, x):
        return torch.logcumsumexp(x * self.scale, -1)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def build():
    return Odd()


def sample(batch, seq):
    return {"x": torch.randn(batch, seq, 16), "labels": torch.randint(0, 10, (batch, seq))}
'''


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_models(tmp_path_factory.mktemp("models"))


def planned(graph: ModelGraph, world: int, **fix: Any) -> Plan:
    made = plan(graph, f"{world}xcpu", global_batch=BATCH, seq=SEQ, fix=fix)
    assert isinstance(made, Plan)
    return made


@pytest.mark.parametrize(
    ("model", "fix", "words"),
    [
        ("unet", {"pp": 2}, "no layout of 4 devices has pp=2: the model has no list of layers that it walks in order"),
        ("t5", {"pp": 2}, "no layout of 4 devices has pp=2: the model has no list of layers that it walks in order"),
        ("vit", {"tp": 2, "sp": True}, "no layout of 4 devices has tp=2, sp=True: tp=2 with sp: a sequence of 17 is not divisible by 2"),
        ("mamba", {"cp": 2}, "no layout of 4 devices has cp=2: backbone.layers.0 has no attention that would join the parts"),
        ("gpt2", {"ep": 2}, "no layout of 4 devices has ep=2: the model has no experts that can be told apart"),
    ],
)
def test_what_a_family_cannot_do_is_refused_in_a_sentence(sources: dict[str, str], model: str, fix: dict[str, Any], words: str) -> None:
    """A degree that the model's structure does not allow names the cause."""
    with pytest.raises(InputError) as error:
        planned(trace(sources[model], seq=SEQ, precision="fp32"), 4, **fix)
    assert str(error.value) == words


def test_matrices_that_stay_whole_are_noted(sources: dict[str, str]) -> None:
    """BERT's two rows of token types cannot be split by four, and every other matrix can."""
    bert = trace(sources["bert"], seq=SEQ, precision="fp32")
    note = "matrices that are whole on every tensor-parallel rank: bert.embeddings.token_type_embeddings.weight"
    assert note in planned(bert, 4, tp=4).notes
    assert note not in planned(bert, 4, tp=2).notes


def _gradients(source: str, graph: ModelGraph, made: Plan | None) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of the plain model, or of what apply made of it."""
    torch.manual_seed(0)
    model: nn.Module = import_target(source)[1]()
    inputs, labels = make_batch(graph, BATCH)
    if made is None:
        out: Tensor = model(**inputs)
        loss = nn.functional.cross_entropy(out.flatten(0, -2), labels.flatten())
        loss.backward()
        return loss.item(), {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    parallel = apply(made, model)
    loss = parallel.train_step(inputs, labels)
    return loss.item(), {n: g.numpy() for n, g in parallel.full_gradients().items()}


@pytest.mark.parametrize("fix", [{"tp": 2}, {"tp": 1, "pp": 2}])
def test_an_op_without_a_rule_is_computed_whole(tmp_path: Path, fix: dict[str, Any]) -> None:
    """Every tensor-parallel rank computes it, the plan says so, the layers around it are split, and the numbers are the model's own."""
    path = tmp_path / "tiny_odd.py"
    path.write_text(ODD)
    source = f"{path}:build"
    graph = trace(source, seq=SEQ, precision="fp32")
    made = planned(graph, 2, **fix)
    ops = "aten.logcumsumexp in layers.0.act, aten.logcumsumexp in layers.1.act"
    note = f"computed on every tensor-parallel rank, for want of a sharding rule: {ops}"
    assert (note in made.notes) == (fix["tp"] > 1)
    assert {m.params.get("weight") for group in made.solution.layer_shardings for m in group.modules} >= ({"S0"} if fix["tp"] > 1 else set())
    loss, wanted = run(1, _gradients, source, graph, None)[0]
    ranks = run(2, _gradients, source, graph, made)
    assert {name for _, gradients in ranks for name in gradients} == set(wanted)
    for found, gradients in ranks:
        assert found == pytest.approx(loss, rel=1e-6)
        for name, g in gradients.items():
            assert g == pytest.approx(wanted[name], rel=5e-6, abs=5e-6 * float(abs(wanted[name]).max())), name
