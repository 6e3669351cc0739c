"""A plan on a compiled cost model: which ops it prices, on which local shapes, and what it says of the rest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from meshwright.costmodel import collectives
from meshwright.costmodel.compile import compile_profile
from meshwright.costmodel.compute import IN_STEP
from meshwright.costmodel.model import CostModel
from meshwright.costmodel.pricing import misalignment, price_ops
from meshwright.costmodel.sharded import ShardedBlock
from meshwright.planner.plan import Plan
from meshwright.planner.shardedmodel import shard_model
from meshwright.planner.solve import plan
from meshwright.profiling.cluster import load_device, parse_cluster
from meshwright.profiling.graph import ModelGraph
from meshwright.profiling.trace import trace
from tests.costmodel import made

MODEL = "examples/models/tiny-llama.json"


@pytest.fixture(scope="module")
def costs() -> CostModel:
    return compile_profile(made.profile())


@pytest.fixture(scope="module")
def graph() -> ModelGraph:
    return trace(MODEL, seq=512, precision="bf16")


def test_products_are_priced_at_the_shapes_that_a_rank_has(costs: CostModel, graph: ModelGraph) -> None:
    device = load_device("H100-SXM")
    shards = shard_model(graph, 4, False)
    layer = next(b for b in shards if b.block.repeated)
    batches = np.array([1, 4])

    got = price_ops(layer, device, batches, costs)

    wide, narrow = 688 / 4, 256.0
    for i, op in enumerate(layer.block.ops):
        if op.kind != "matmul":
            continue
        m, n, k = 512.0 * batches, op.dims["n"], op.dims["k"]
        # column-parallel products divide n, row-parallel ones k
        n, k = (n / 4, k) if layer.states[op.name] != "P" else (n, k / 4)
        expected = costs.seconds("gemm", dtype="bf16", m=m, n=np.full(2, float(n)), k=np.full(2, float(k)))
        factor = misalignment(device, "bf16", np.full(2, float(n)), np.full(2, float(k))) / IN_STEP
        np.testing.assert_allclose(got.forward[:, i], expected * factor)
    assert got.basis["gemm"] == "fitted"
    assert {wide, narrow} <= {*(op.dims["n"] / 4 for op in layer.block.ops if op.kind == "matmul"), 256.0}


def test_backward_of_a_product_is_its_two_products(costs: CostModel, graph: ModelGraph) -> None:
    device = load_device("H100-SXM")
    layer = next(b for b in graph.blocks if b.repeated)
    i = next(i for i, op in enumerate(layer.ops) if op.kind == "matmul")
    d = layer.ops[i].dims

    got = price_ops(ShardedBlock.whole(layer), device, np.array([2]), costs)

    m, n, k = (np.array([float(x)]) for x in (2 * 512, d["n"], d["k"]))
    expected = costs.seconds("gemm", dtype="bf16", m=m, n=k, k=n) + costs.seconds("gemm", dtype="bf16", m=n, n=k, k=m)
    assert got.backward[0, i] == pytest.approx(float(expected[0]) / IN_STEP, rel=1e-6)


def test_packed_projections_are_priced(costs: CostModel, tmp_path: Path) -> None:
    """A product whose columns are split inside each of three pieces (GPT-2's q, k and v) is divided like any other column-parallel one."""
    path = tmp_path / "config.json"
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128}
    path.write_text(json.dumps(config))
    layer = next(b for b in shard_model(trace(str(path), seq=64, precision="bf16"), 2, False) if b.block.repeated)
    ops = layer.block.ops
    packed = next(i for i, op in enumerate(ops) if op.kind == "matmul" and layer.states.get(op.name, "").endswith("x3"))

    got = price_ops(layer, load_device("H100-SXM"), np.array([1]), costs)

    op = ops[packed]
    m, n, k = (np.array([float(x)]) for x in (64, op.dims["n"] / 2, op.dims["k"]))
    expected = costs.seconds("gemm", dtype="bf16", m=m, n=n, k=k) * misalignment(load_device("H100-SXM"), "bf16", n, k) / IN_STEP
    np.testing.assert_allclose(got.forward[:, packed], expected)


def test_odd_sizes_cost_more() -> None:
    device, k = load_device("H100-SXM"), np.full(4, 4096.0)

    factor = misalignment(device, "bf16", np.array([50304.0, 50272.0, 50264.0, 50257.0]), k)

    assert factor[0] == 1.0
    assert (np.diff(factor[:3]) > 0).all()
    assert factor[3] == factor[2]
    assert (misalignment(load_device("cpu"), "fp32", k - 1, k) == 1).all()


def test_measured_collectives_replace_the_datasheet_unless_the_cluster_knows_better(costs: CostModel) -> None:
    cluster = parse_cluster("2x8xH100-SXM")
    node, both = cluster.group(range(8)), cluster.group(range(16))
    size = np.array([1e8])

    one = collectives.seconds("all_gather", size, node, costs)
    two = collectives.seconds("all_gather", size, both, costs)

    np.testing.assert_allclose(one, costs.collective_seconds("all_gather", size, 8))
    assert two[0] > one[0]
    assert two[0] >= 1e8 / 8 / 2 / both.network_link.bandwidth_Bps
    measured = node.model_copy(update={"node_link": node.node_link.model_copy(update={"provenance": "measured"})})
    np.testing.assert_allclose(collectives.seconds("all_gather", size, measured, costs), collectives.seconds("all_gather", size, measured))


def test_a_plan_names_what_it_rests_on(graph: ModelGraph) -> None:
    shipped = plan(graph, "2xH100-SXM", global_batch=8, seq=512)
    sheet = plan(graph, "2xH100-SXM", global_batch=8, seq=512, costs=None)
    without = compile_profile(made.profile())
    without.classes.pop("gemm")
    leaning = plan(graph, "2xH100-SXM", global_batch=8, seq=512, costs=without)

    assert all(isinstance(p, Plan) for p in (shipped, sheet, leaning))
    assert any("compiled cost model of H100-SXM" in line for line in shipped.prediction.provenance)  # type: ignore[union-attr]
    assert not any("compiled" in line for line in sheet.prediction.provenance)  # type: ignore[union-attr]
    assert any(line.startswith("attention, gemm, norms and pointwise: no samples, priced by the datasheet") for line in leaning.prediction.provenance)  # type: ignore[union-attr]
    assert shipped.inputs_hash != sheet.inputs_hash  # type: ignore[union-attr]


def test_ranks_that_share_cores_slow_each_other_but_not_while_they_wait(graph: ModelGraph) -> None:
    """Four ranks on two cores take twice as long as on four; in a pipeline's bubble a rank leaves its core."""
    from meshwright.costmodel.layouts import Layouts
    from meshwright.costmodel.step import Bound

    def factor(cores: int, pp: int, microbatches: int) -> float:
        cluster = parse_cluster("4xcpu")
        node = cluster.nodes[0]
        shared = cluster.model_copy(update={"nodes": (node.model_copy(update={"device": node.spec.model_copy(update={"cores": cores})}),)})
        layouts = Layouts.of(pp=pp, dp=4 // pp, microbatches=microbatches)
        bound = Bound(graph, type(cluster)(name="c", nodes=shared.nodes), {(1, False): [ShardedBlock.whole(b) for b in graph.blocks]}, [1])
        return float(bound._crowding(layouts)[0])

    assert factor(4, 1, 1) == 1.0
    assert factor(2, 1, 1) == 2.0
    assert factor(2, 4, 1) == 1.0  # one of four computes at a time
    assert 1.0 < factor(2, 4, 8) < 2.0
