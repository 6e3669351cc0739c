"""The memory model against the dry run, on random pairs of benchmarks/memory.py, and bytes of single blocks by hand."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tiny import SEQ, TINY
from transformers import LlamaConfig

from meshwright.costmodel.memory import block_memory
from meshwright.planner.plan import Layout, Workload
from meshwright.planner.search import Search
from meshwright.planner.shardedmodel import shard_model
from meshwright.planner.space import Space
from meshwright.profiling.cluster import parse_cluster
from meshwright.profiling.graph import Block, ModelGraph
from meshwright.profiling.trace import trace

ROOT = Path(__file__).resolve().parents[2]
PAIRS, SEED, BAR = 40, 0, 0.02


# --- against the dry run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    """benchmarks/memory.py, which is no package."""
    spec = importlib.util.spec_from_file_location("benchmarks_memory", ROOT / "benchmarks" / "memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def drawn(benchmark: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Any]:
    """What the benchmark draws as its n-th pair of small models, checked when it is asked for."""
    draw = benchmark.Draw(SEED, tmp_path_factory.mktemp("pairs"), 0.0)
    check, asked = benchmark.check, []

    def nth(n: int) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(benchmark, "check", lambda *of: of)
            while len(asked) <= n:
                asked.append(draw.pair())
        return check(*asked[n])

    return nth


def told(benchmark: ModuleType, pair: Any) -> str:
    out = io.StringIO()
    benchmark.show(pair, out)
    return out.getvalue()


@pytest.mark.parametrize("n", range(PAIRS))
def test_random_pairs_are_within_two_percent(benchmark: ModuleType, drawn: Callable[[int], Any], n: int) -> None:
    """Live bytes of a random stage of a random layout of a random small model are those of the dry run."""
    pair = drawn(n)
    assert abs(pair.error) <= BAR, told(benchmark, pair)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("llama-3.1-8b", {"tp": 1, "pp": 1, "dp": 8, "zero": 3, "recompute": "full"}),
        ("qwen3-32b", {"tp": 2, "sp": True, "pp": 4, "dp": 1, "zero": 0, "recompute": "selective"}),
    ],
)
def test_large_models_are_within_two_percent(benchmark: ModuleType, model: str, layout: dict[str, Any]) -> None:
    """The same of two models of examples/models on eight GPUs, the first stage."""
    graph = trace(str(ROOT / "examples" / "models" / f"{model}.json"), seq=2048, precision="bf16")
    cluster = benchmark.boundless(parse_cluster("8xH100-SXM"))
    workload = Workload(global_batch=32, seq=2048, precision="bf16")
    pair = benchmark.check(graph, cluster, workload, Layout(micro_batch=1, **layout), 0)
    assert abs(pair.error) <= BAR, told(benchmark, pair)


# model, precision, layout, of each stage recompute's mode and for full the share of its layers, stage that is run
BY_STAGE: list[tuple[str, str, dict[str, Any], list[tuple[int, float]], int]] = [
    ("llama", "bf16", {}, [(2, 0.9)], 0),
    ("qwen3", "bf16", {"dp": 4, "zero": 3}, [(2, 0.3)], 0),
    ("llama", "fp32", {"dp": 2, "zero": 1}, [(2, 0.5)], 0),
    ("llama", "bf16", {"pp": 2}, [(2, 0.25), (0, 0)], 0),
    ("gpt2", "bf16", {"pp": 2}, [(0, 0), (2, 0.5)], 1),
    ("qwen3", "bf16", {"tp": 2, "sp": True, "pp": 2, "dp": 2, "zero": 1}, [(2, 0.5), (2, 0.25)], 0),
    ("llama", "fp32", {"tp": 2, "pp": 2}, [(2, 0.5), (1, 1)], 0),
    ("gpt2", "bf16", {"pp": 4, "dp": 2, "zero": 2}, [(2, 1), (2, 0.5), (2, 0.5), (0, 0)], 2),
    ("llama", "bf16", {"pp": 2, "dp": 2, "zero": 2, "schedule": "gpipe"}, [(2, 0.75), (1, 1)], 0),
    ("llama", "bf16", {"pp": 2}, [(1, 1), (0, 0)], 0),
    ("qwen3", "bf16", {"pp": 2, "dp": 2, "zero": 3}, [(1, 1), (0, 0)], 1),
    ("llama", "fp32", {"tp": 2, "pp": 2}, [(0, 0), (1, 1)], 0),
    ("gpt2", "bf16", {"tp": 2, "sp": True, "pp": 2}, [(0, 0), (1, 1)], 1),
    ("llama", "bf16", {"pp": 4, "dp": 2, "zero": 0}, [(1, 1), (0, 0), (1, 1), (0, 0)], 2),
]
SMALL: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 64, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"], "n_embd": 256, "n_layer": 8, "n_head": 4, "n_positions": 512, "bos_token_id": 0, "eos_token_id": 0,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], ModelGraph]:
    """Eight layers of width 256, by architecture and precision."""
    folder, known = tmp_path_factory.mktemp("small"), dict[tuple[str, str], ModelGraph]()
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 4, "max_position_embeddings": 512}

    def made(name: str, precision: str) -> ModelGraph:
        if (name, precision) not in known:
            path = folder / f"{name}.json"
            config = {"model_type": name, "architectures": ["LlamaForCausalLM"], "vocab_size": 4096, **(sizes if name != "gpt2" else {})}
            path.write_text(json.dumps(config | SMALL[name]))
            known[name, precision] = trace(str(path), seq=512, precision=precision)
        return known[name, precision]

    return made


@pytest.mark.parametrize("case", BY_STAGE, ids=lambda c: "-".join(map(str, [c[0], c[1], *c[2].values(), c[3], c[4]])).replace(" ", ""))
def test_recompute_by_stage_is_within_two_percent(
    benchmark: ModuleType, small: Callable[[str, str], ModelGraph], case: tuple[str, str, dict[str, Any], list[tuple[int, float]], int]
) -> None:
    """The same where stages recompute differently, in all of their layers or in the first ones."""
    name, precision, layout, shares, stage = case
    x = Layout(micro_batch=2, recompute="by stage", **layout)
    cluster = benchmark.boundless(parse_cluster(f"{x.devices}xH100-SXM"))
    workload = Workload(global_batch=16 * x.dp, seq=512, precision=precision)  # type: ignore[arg-type]
    pair = benchmark.check(small(name, precision), cluster, workload, x, stage, shares)
    assert [(c.mode, c.layers > 0) for c in pair.choices] == [(mode, mode > 0) for mode, _ in shares]
    assert abs(pair.error) <= BAR, told(benchmark, pair)


def test_recompute_by_stage_matters(benchmark: ModuleType, small: Callable[[str, str], ModelGraph]) -> None:
    """Each layer more that recomputes is told apart from the one before by the dry run, and by the model with what it says."""
    cluster, workload = benchmark.boundless(parse_cluster("1xH100-SXM")), Workload(global_batch=16, seq=512, precision="bf16")
    x = Layout(micro_batch=8, recompute="by stage")
    pairs = [benchmark.check(small("llama", "bf16"), cluster, workload, x, 0, [(2, k / 8)]) for k in (1, 4, 7)]
    run, said = ([p.run.peak_bytes for p in pairs], [p.predicted_bytes for p in pairs])
    assert run[0] > run[1] > run[2]
    assert [b - a for a, b in itertools.pairwise(said)] == pytest.approx([b - a for a, b in itertools.pairwise(run)], rel=0.02)


# --- blocks by hand ---------------------------------------------------------------------------------------------------------


def llama(folder: Path, **more: Any) -> ModelGraph:
    config = LlamaConfig(**{**TINY, **more})
    config.architectures = ["LlamaForCausalLM"]
    path = folder / "llama.json"
    path.write_text(json.dumps(config.to_dict(), default=str))
    return trace(str(path), seq=SEQ, precision="bf16")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> ModelGraph:
    """The tiny Llama in bf16 with a vocabulary beside which nothing else weighs."""
    return llama(tmp_path_factory.mktemp("models"), vocab_size=65536)


def head_of(graph: ModelGraph) -> Block:
    return graph.blocks[graph.sequence[-1].block]


@pytest.mark.parametrize("tp", [1, 4])
def test_the_loss_takes_its_bytes_of_each_logit(wide: ModelGraph, tp: int) -> None:
    """Plain: 12 bytes a logit at the backward of log-softmax, its result and two gradients in fp32. On shards of the vocabulary: 10 a
    local logit at the end of its forward, the logits in bf16 and two in fp32, and less in backward, which is in place."""
    (head,) = (s for s in shard_model(wide, tp, False) if s.block is head_of(wide))
    one, nine = block_memory(head, np.array([1, 9])).__dict__, 8 * SEQ * 65536 / tp
    grown = {name: (v[1] - v[0]) / nine for name, v in one.items() if name in ("forward", "backward", "output", "saved")}
    assert grown["output"] == pytest.approx(2)
    assert max(grown["forward"], grown["backward"]) == pytest.approx(12 if tp == 1 else 10, rel=0.01)
    if tp > 1:
        assert grown["backward"] < grown["forward"]


def test_a_tied_table_counts_once(wide: ModelGraph, tmp_path: Path) -> None:
    """With one stage the embedding's table is the head's: a model holds it once, and in a pipeline each end holds one."""
    tied = llama(tmp_path, vocab_size=65536, tie_word_embeddings=True)
    table = 65536 * TINY["hidden_size"]

    def numel(graph: ModelGraph, pp: int) -> float:
        cluster = parse_cluster("2xH100-SXM")
        fixed = {"pp": pp, "tp": 1, "zero": 0, "dp": 2 // pp, "micro_batch": 1, "schedule": "1f1b", "loss": "plain", "offload": "none"}
        space = Space(graph, cluster, Workload(global_batch=4, seq=SEQ, precision="bf16"), fixed)
        search, (layout,) = Search(space, 1e15), space.layouts()
        return float(search.bound.stage_memory(search.row(layout), 0, np.zeros(len(graph.layers), int)).b.padded.sum())

    assert numel(wide, 1) - numel(tied, 1) == table
    assert numel(wide, 2) == numel(tied, 2)
    assert numel(tied, 1) == tied.numel


def test_what_recompute_keeps(wide: ModelGraph) -> None:
    """Full recompute keeps a layer's input, of bf16; selective also what matmuls and attention made, and no more than none keeps."""
    layer = next(s for s in shard_model(wide, 1, False) if s.block.repeated)
    memory = block_memory(layer, np.array([1, 4]))
    width, kv = TINY["hidden_size"], 2 * TINY["hidden_size"] * TINY["num_key_value_heads"] / TINY["num_attention_heads"]
    carry = np.array([1, 4]) * SEQ * width * 2
    assert memory.kept("full").tolist() == memory.carry.tolist() == carry.tolist()
    # q, k, v, attention, its output, and the three of the MLP; the log-sum-exp in fp32 of each head
    made = SEQ * (2 * (3 * width + kv + 2 * TINY["intermediate_size"] + width) + 4 * TINY["num_attention_heads"])
    assert memory.kept("selective")[0] == pytest.approx(made + carry[0])
    assert (memory.kept("full") < memory.kept("selective")).all()
    assert (memory.kept("selective") <= memory.kept("none") + carry).all()
    assert memory.again("none").tolist() == [0, 0]


def test_a_block_never_holds_less_than_it_keeps(wide: ModelGraph) -> None:
    """While a block runs it holds what it leaves, and bytes grow with the microbatch by as much for each sample."""
    for tp, sp in ((1, False), (2, False), (2, True)):
        for sharded in shard_model(wide, tp, sp):
            memory = block_memory(sharded, np.array([1, 2, 3]))
            assert (memory.forward >= memory.saved).all()
            assert (memory.backward >= memory.saved).all()
            assert (memory.backward >= memory.backward_in_place).all()
            for values in (getattr(memory, f.name) for f in dataclasses.fields(memory)):
                if isinstance(values, np.ndarray) and values.shape == (3,):
                    assert values[2] - values[1] >= -1e-6


def test_rows_are_padded_to_equal_shares(wide: ModelGraph) -> None:
    """FSDP pads the rows of each parameter to a multiple of the ranks: on 7, a layer's 64 rows become 70, its 128 become 133."""
    layer = next(s for s in shard_model(wide, 1, False) if s.block.repeated)
    memory = block_memory(layer, np.array([1]))
    expected = sum(-(-p.shape[0] // 7) * 7 * p.numel / p.shape[0] for p in layer.block.params)
    assert memory.padded(7) == expected
    assert memory.padded(1) == memory.numel == sum(p.numel for p in layer.block.params)


def test_tensor_parallelism_divides_what_is_kept(wide: ModelGraph) -> None:
    """On four ranks with sequence parallelism each keeps a quarter of what one alone keeps of a layer, and the rest of the two tensors that
    it gathered for the attention and the MLP."""
    keeps = {}
    for tp in (1, 4):
        layer = next(s for s in shard_model(wide, tp, tp > 1) if s.block.repeated)
        one, two = block_memory(layer, np.array([1, 2])).saved
        keeps[tp] = two - one
    assert keeps[4] == keeps[1] / 4 + 2 * 3 / 4 * SEQ * TINY["hidden_size"] * 2


def test_every_layout_holds_its_parameters(tiny_llama: ModelGraph) -> None:
    """Live bytes of every layout are finite, and more than its parameters and their state take on the average rank."""
    space = Space(tiny_llama, parse_cluster("4xH100-SXM"), Workload(global_batch=8, seq=SEQ, precision="fp32"))
    search, seen = Search(space, 1e15), set()
    for x in space.layouts():
        _, cut = search.stages(search.row(x)).least_memory()
        live = max(c.live_bytes for c in cut.costs)
        shards = x.shard * x.cp if x.zero else 1
        assert np.isfinite(live)
        assert live > (12 if x.offload == "none" else 4) * tiny_llama.numel / x.tp / x.pp / shards
        seen |= {f"cp={x.cp}", f"vpp={x.vpp}", f"zero={x.zero}", f"replicas={x.replicas}", x.schedule}
    assert {"cp=1", "cp=4", "vpp=2", "zero=0", "zero=3", "replicas=2", "1f1b", "interleaved"} <= seen
