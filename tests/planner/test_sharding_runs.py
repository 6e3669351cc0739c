"""Sharded families on two gloo ranks: what their module tables compute is what the plain model computes, gradients included."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
from harness import run
from test_sharding_families import CONFIGS, EXAMPLES, family

from meshwright.codegen.runtime.tensor_parallel import Local, unpack
from meshwright.planner.plan import ModuleSharding
from meshwright.planner.shardedmodel import shard_model
from meshwright.planner.tables import module_tables
from meshwright.profiling.graph import ModelGraph
from meshwright.profiling.loading import import_target, main_output

TOLERANCE = 5e-6  # of each gradient's largest value
warnings.filterwarnings("ignore")


def build(name: str) -> nn.Module:
    """The family's model in fp32 with the same weights at every call, without dropout."""
    torch.manual_seed(0)
    if name == "unet":
        made = import_target(f"{EXAMPLES / 'unet.py'}:build")[0]
        return made.UNet(16).train()  # type: ignore[no-any-return,attr-defined]
    config, sizes, architecture = CONFIGS[name]
    return getattr(transformers, architecture)(getattr(transformers, config)(**sizes)).float().eval()  # type: ignore[no-any-return]


def outcome(name: str, model: nn.Module, graph: ModelGraph) -> dict[str, Tensor]:
    """The output of the model on fixed inputs, and the gradients of a fixed function of it."""
    generator = torch.Generator().manual_seed(1)
    inputs = {}
    for i in graph.inputs:
        shape = [2 * n if d == i.spec.batch_dim else n for d, n in enumerate(i.spec.shape)]
        inputs[i.name] = torch.randint(0, i.high, shape, generator=generator) if i.high else torch.randn(shape, generator=generator)
    out = main_output(model(**inputs))
    assert out is not None
    (out * torch.randn(out.shape, generator=generator)).mean().backward()
    return {"": out.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def on_rank(name: str, graph: ModelGraph, modules: list[ModuleSharding]) -> dict[str, Tensor]:
    """As outcome, on one of two ranks whose modules run on their shards."""
    mesh, model = init_device_mesh("cpu", (2,)), build(name)
    packed = {}
    for m in sorted(modules, key=lambda m: -len(m.module)):
        Local(m.params, m.inputs, m.outputs, m.sizes)._apply(model.get_submodule(m.module), mesh)
        packed |= {f"{m.module}.{n}": s for n, s in m.params.items() if "x" in s}
    found = outcome(name, model, graph)
    for n, g in found.items():
        if isinstance(g, DTensor):
            dim, _, pieces = packed.get(n, "S0x1")[1:].partition("x")
            found[n] = unpack(g.full_tensor(), int(dim), int(pieces), 2)
    return {n: g.numpy() for n, g in found.items()}


@pytest.mark.parametrize("name", ["mamba", "mixtral", "deepseek", "t5", "unet"])
def test_two_ranks_compute_what_one_does(name: str) -> None:
    """Scans by channel, latent attention, position biases by heads, group norms by groups: outputs and every gradient are the same."""
    graph = family(name)
    sharded = shard_model(graph, 2, False, loss="plain")
    assert not any(c.module == "" for b in sharded for c in b.conversions)  # all of it is in the tables
    inside, outside = module_tables(graph, sharded)
    modules = list(outside)
    for table in inside:
        paths = [graph.layers[i].path for i in table.layers]
        modules += [m.model_copy(update={"module": f"{path}.{m.module}".rstrip(".")}) for path in paths for m in table.modules]
    tied = {n for group in graph.tied for n in group}  # tables shard each name by itself; what ties them again is not tested here
    plain = {n: g for n, g in outcome(name, build(name), graph).items() if n not in tied}
    assert len(plain) > 20
    for found in run(2, on_rank, name, graph, modules):
        assert set(found) - tied == set(plain)
        floor = 1e-3 * max(float(g.abs().max()) for g in plain.values())
        errors = {n: float((torch.from_numpy(found[n]) - g).abs().max()) / max(float(g.abs().max()), floor) for n, g in plain.items()}
        assert max(errors.values()) < TOLERANCE, max(errors, key=errors.__getitem__)
