"""Odd clusters and models give a plan, or one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import SEQ, TINY
from transformers import LlamaConfig

from meshwright.planner.plan import Plan
from meshwright.planner.solve import Infeasible, plan
from meshwright.profiling.cluster import Cluster, Node, parse_cluster, read_cluster
from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import ModelGraph
from meshwright.profiling.trace import trace


def planned(graph: ModelGraph, cluster: str | Cluster, batch: int = 8, **more: object) -> Plan:
    made = plan(graph, cluster, global_batch=batch, seq=graph.seq, precision=graph.precision, **more)  # type: ignore[arg-type]
    assert isinstance(made, Plan)
    assert made.verify() == []
    assert made.solver.gap == 0.0
    return made


@pytest.mark.parametrize("devices", [1, 2, 3, 5, 7])
def test_any_number_of_devices_is_planned(tiny_llama: ModelGraph, devices: int) -> None:
    """Primes too: 7 devices, and a batch that 7 divides."""
    made = planned(tiny_llama, f"{devices}xH100-SXM", batch=2 * 3 * 5 * 7)
    assert made.layout.devices == devices


def test_a_batch_that_nothing_divides_is_refused_in_a_sentence(tiny_llama: ModelGraph) -> None:
    with pytest.raises(InputError, match="no layout of 11 devices is possible: .*divi"):
        plan(tiny_llama, "11xH100-SXM", global_batch=1, seq=SEQ, precision="fp32")


def traced(folder: Path, seq: int = SEQ, **config: int) -> ModelGraph:
    made = LlamaConfig(**{**TINY, **config})
    made.architectures = ["LlamaForCausalLM"]
    path = folder / "model.json"
    path.write_text(json.dumps(made.to_dict(), default=str))
    return trace(str(path), seq=seq, precision="fp32")


def test_one_layer_has_no_pipeline(tmp_path: Path) -> None:
    assert planned(traced(tmp_path, num_hidden_layers=1), "4xH100-SXM").layout.pp == 1


def test_a_sequence_that_is_not_divisible_is_not_split(tmp_path: Path) -> None:
    graph = traced(tmp_path, seq=33)
    made = planned(graph, "4xH100-SXM")
    assert made.layout.cp == 1
    assert not made.layout.sp
    with pytest.raises(InputError, match="33"):
        planned(graph, "4xH100-SXM", fix={"cp": 2})


def test_a_model_larger_than_the_cluster_says_what_would_fit(tiny_llama: ModelGraph) -> None:
    """The least that it needs, and relaxations that fit, each solved."""
    told = plan(tiny_llama, "2xH100-SXM", global_batch=8, seq=SEQ, precision="fp32", limit="1500MB")
    assert isinstance(told, Infeasible)
    assert told.needs_bytes > told.limit_bytes
    assert told.nearest
    assert all(n.peak_bytes > 0 and n.step_s > 0 for n in told.nearest)
    assert told.solver.space == told.solver.pruned_by_memory + told.solver.pruned_by_bound + told.solver.evaluated


def test_unlike_devices_get_unlike_stages(tmp_path: Path) -> None:
    """A node of H100 and one of A100: the faster stage holds more layers, and no stage more than its own devices have."""
    graph = traced(tmp_path, num_hidden_layers=12, hidden_size=512, intermediate_size=2048, vocab_size=64)
    graph = graph.model_copy(update={"precision": "fp32"})
    cluster = Cluster(nodes=(Node(device="H100-SXM", devices=2), Node(device="A100-SXM-40GB", devices=2)))
    made = planned(graph, cluster, batch=64, fix={"pp": 2, "tp": 1, "schedule": "1f1b"}, costs=None)
    first, second = (s.layers[1] - s.layers[0] for s in made.solution.stages)
    assert first > second
    swapped = Cluster(nodes=cluster.nodes[::-1])
    again = planned(graph, swapped, batch=64, fix={"pp": 2, "tp": 1, "schedule": "1f1b"}, costs=None)
    first, second = (s.layers[1] - s.layers[0] for s in again.solution.stages)
    assert first < second


def write(folder: Path, matrix: list[list[float]]) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(json.dumps({"nodes": [{"device": "A100-SXM-80GB", "devices": 4}], "bandwidth_Bps": matrix}))
    return path


def test_a_matrix_that_is_not_square_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="4 rows of 4"):
        read_cluster(write(tmp_path, [[1e9] * 4] * 3))
    with pytest.raises(InputError, match="4 rows of 4"):
        read_cluster(write(tmp_path, [[1e9] * 4] * 3 + [[1e9] * 3]))


def test_a_matrix_that_is_not_symmetric_is_planned_on(tiny_llama: ModelGraph, tmp_path: Path) -> None:
    """A link may be slow one way only: the plan keeps away from it, or takes the default order where that is as good."""
    matrix = np.full((4, 4), 2e11)
    matrix[0, 1] = 1e8
    made = planned(tiny_llama, read_cluster(write(tmp_path, matrix.tolist())), fix={"dp": 2, "pp": 2})
    default = plan(tiny_llama, parse_cluster("4xA100-SXM-80GB"), global_batch=8, seq=SEQ, precision="fp32", fix={"dp": 2, "pp": 2})
    assert isinstance(default, Plan)
    assert sorted(made.solution.rank_map or range(4)) == [0, 1, 2, 3]
    assert made.solution.rank_map, "ranks 0 and 1 share data in the default order, over the slow link"
    assert "laid over the measured links" in " ".join(made.notes)
