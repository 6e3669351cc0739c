"""Kernels are found in traced models, chosen by price, and take the place of eager code in live ones without changing their numbers."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
from harness import run
from models import SEQ, build, make_batch, write_models

from meshwright.codegen.apply import apply
from meshwright.codegen.kernels import choose as choosing
from meshwright.codegen.kernels.choose import VOCAB_PARALLEL, Kernel, choose
from meshwright.codegen.kernels.emitted import files
from meshwright.codegen.kernels.install import fused_text, install
from meshwright.codegen.kernels.regions import find
from meshwright.costmodel.model import CostModel
from meshwright.costmodel.sharded import ShardedBlock
from meshwright.planner.shardedmodel import shard_model
from meshwright.planner.solve import plan
from meshwright.profiling.cluster import load_device, parse_cluster
from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import ModelGraph
from meshwright.profiling.loading import main_output
from meshwright.profiling.trace import trace
from meshwright.report.kernels import render_kernels, render_source

NAMES = ("llama", "qwen3", "gpt2", "mixer")
BATCH = 2


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("kernels")))
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def graphs(sources: dict[str, str]) -> dict[str, ModelGraph]:
    return {name: trace(sources[name], seq=SEQ, precision="fp32") for name in NAMES}


def all_kernels(graph: ModelGraph, tp: int = 1, sp: bool = False) -> tuple[Kernel, ...]:
    """Every kernel that there is, worth it or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "WORTH", 100.0)
        return choose(graph, shard_model(graph, tp, sp), load_device("H100-SXM"), None, BATCH)


def one_step(model: nn.Module, graph: ModelGraph) -> tuple[float, dict[str, Tensor]]:
    inputs, labels = make_batch(graph, BATCH)
    out = main_output(model(**inputs) if graph.origin == "hf" else model(*inputs.values()))
    assert out is not None
    torch.manual_seed(5)
    loss = (out.float() * torch.randn(out.shape)).mean()
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


WANTED = {
    "llama": {"input_layernorm": "rms_norm", "post_attention_layernorm": "add_rms_norm", "self_attn": "rope", "mlp": "swiglu", "norm": "rms_norm"},
    "qwen3": {"self_attn": "rms_norm_rope", "mlp": "swiglu", "post_attention_layernorm": "add_rms_norm"},
    "gpt2": {"act": "gelu_tanh", "ln_2": "add_layer_norm"},
}


@pytest.mark.parametrize("name", WANTED)
def test_regions_are_found_by_what_they_compute(graphs: dict[str, ModelGraph], name: str) -> None:
    """Norms, residual norms, rotary embeddings and gates, each in the module that holds it; no op is in two of them."""
    found: dict[str, set[str]] = {}
    for block in graphs[name].blocks:
        ops: list[str] = []
        for region in find(ShardedBlock.whole(block)):
            found.setdefault(region.module.rpartition(".")[2], set()).update(u.recipe.label for u in region.uses)
            ops += [n for u in region.uses for n in u.ops]
        assert len(ops) == len(set(ops))
    for module, label in WANTED[name].items():
        assert label in found[module], found


def test_shapes_are_those_of_the_shard(graphs: dict[str, ModelGraph]) -> None:
    """On two ranks with sequence parallelism: half of the sequence for norms, half of the heads, half of the MLP's width."""
    graph = graphs["llama"]
    layer = next(s for s in shard_model(graph, 2, True) if s.block.repeated)
    shapes = {u.recipe.label: u.recipe.shape for r in find(layer) for u in r.uses}
    assert shapes["add_rms_norm"] == (1, SEQ // 2, 32)
    assert shapes["swiglu"] == (1, SEQ, 32)
    assert shapes["rope"] in ((1, 4, SEQ, 4), (1, 2, SEQ, 4))


def test_kernels_are_chosen_where_the_cost_model_says_that_they_gain() -> None:
    """On Llama-3.1-8B every choice moves fewer bytes, takes less time and keeps no more than eager; the loss where its classes are sharded."""
    graph = trace("examples/models/llama-3.1-8b.json", seq=4096, precision="bf16")
    device, costs = load_device("H100-SXM"), CostModel.find("H100-SXM")
    chosen = choose(graph, shard_model(graph, 4, True), device, costs, 1, "vocab_parallel")
    assert {k.name.rpartition("_")[0].rpartition("_")[0] for k in chosen} >= {"rms_norm", "add_rms_norm", "swiglu"}
    assert [k.kind for k in chosen].count(VOCAB_PARALLEL) == 1
    assert not any(k.kind == VOCAB_PARALLEL for k in choose(graph, [ShardedBlock.whole(b) for b in graph.blocks], device, costs, 1))
    for k in chosen:
        assert k.fused_s < k.eager_s
        assert k.fused_bytes < k.eager_bytes
        assert k.saved_change_bytes <= 0
        assert Kernel.model_validate_json(k.model_dump_json()) == k
    residual = next(k for k in chosen if k.name.startswith("add_rms_norm"))
    assert residual.save == "statistics"
    assert residual.saved_bytes["statistics"] < residual.saved_bytes["inputs"]
    assert not any(k.region and k.region.place == "rotary" for k in choose(graph, shard_model(graph, 4, True), device, costs, 1, cp=2))


@pytest.mark.parametrize("name", NAMES)
def test_a_model_with_kernels_computes_what_it_did(sources: dict[str, str], graphs: dict[str, ModelGraph], name: str) -> None:
    """Loss within 1e-6 and every gradient within 5e-6 of its model's largest, fp32."""
    plain = build(sources[name])
    fused = copy.deepcopy(plain)
    found = install(fused, all_kernels(graphs[name]))
    assert found.done
    loss, grads = one_step(plain, graphs[name])
    with_kernels, gradients = one_step(fused, graphs[name])
    assert abs(loss - with_kernels) <= 1e-6 * max(1.0, abs(loss))
    assert gradients.keys() == grads.keys()
    largest = max(g.abs().max().item() for g in grads.values())
    assert max((gradients[n] - g).abs().max().item() for n, g in grads.items()) <= 5e-6 * largest


def test_submodules_keep_their_hooks(sources: dict[str, str], graphs: dict[str, ModelGraph]) -> None:
    """What is not in a region is called as before; what a region replaced says so."""
    model = build(sources["llama"])
    seen: list[str] = []
    layer = model.get_submodule("model.layers.0")
    for path in ("mlp.gate_proj", "mlp.down_proj", "self_attn", "input_layernorm", "post_attention_layernorm"):
        layer.get_submodule(path).register_forward_hook(lambda *_, path=path: seen.append(path))
    found = install(model, all_kernels(graphs["llama"]))
    one_step(model, graphs["llama"])
    assert seen == ["input_layernorm", "self_attn", "post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj"]
    assert found.done["model.layers.0.mlp"].splitlines()[3].strip() == "mul_11 = swiglu(linear_4, linear_5)"
    assert "self.post_attention_layernorm(residual, hidden_states)" in found.done["model.layers.0.post_attention_layernorm"]


def test_a_forward_of_another_form_is_left_and_said(sources: dict[str, str], graphs: dict[str, ModelGraph]) -> None:
    """GPT-2 tests for cross-attention between its addition and its norm; a module whose forward is not its class's own stays as it is."""
    model = build(sources["gpt2"])
    left = install(model, all_kernels(graphs["gpt2"])).left
    assert left["transformer.h.0.ln_2"] == "the norm does not follow an addition"
    again = install(model, all_kernels(graphs["gpt2"])).left
    assert again["transformer.h.0.mlp.act"] == "its forward was replaced before"


class _Layer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        skip = x
        x = skip + self.first(x)  # type: ignore[operator]
        skip = x
        x = self.norm(x)  # type: ignore[operator]
        return skip + x


def test_the_layer_reads_as_before_with_one_call_for_addition_and_norm() -> None:
    assert fused_text(_Layer.forward, "norm").splitlines() == [
        "def forward(self, x):", "    skip = x", "    normed = self.norm(skip, self.first(x))", "    x = self.norm.__dict__.pop('added')",
        "    skip = x", "    x = normed", "    return skip + x",
    ]  # fmt: skip


def test_a_script_has_a_folder_of_kernels(sources: dict[str, str], graphs: dict[str, ModelGraph], tmp_path: Path) -> None:
    """It imports nothing of meshwright, and its install() gives the model's own numbers."""
    graph = graphs["llama"]
    folder = tmp_path / "kernels_of_a_plan"
    folder.mkdir()
    for name, text in files(all_kernels(graph)).items():
        (folder / name).write_text(text)
        assert "meshwright." not in text
    plain = build(sources["llama"])
    fused = copy.deepcopy(plain)
    sys.path.insert(0, str(tmp_path))
    try:
        importlib.import_module(folder.name).install(fused)
    finally:
        sys.path.remove(str(tmp_path))
    assert "forward" in fused.get_submodule("model.layers.0.mlp").__dict__
    (loss, grads), (made, gradients) = one_step(plain, graph), one_step(fused, graph)
    assert abs(loss - made) <= 1e-6
    largest = max(g.abs().max().item() for g in grads.values())
    assert max((gradients[n] - g).abs().max().item() for n, g in grads.items()) <= 5e-6 * largest


def test_kernels_are_shown_in_a_hundred_columns(graphs: dict[str, ModelGraph]) -> None:
    """The answer first, then each kernel with its formula and modules; its source by name, or which names there are."""
    kernels = all_kernels(graphs["llama"])
    text = render_kernels(kernels)
    assert text.startswith("Kernels  ")
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "h = a + b" in text
    assert "model.layers.0-7.mlp" in text
    name = next(k.name for k in kernels if k.name.startswith("swiglu"))
    assert render_source(kernels, "swiglu") == render_source(kernels, name)
    assert "def swiglu(" in render_source(kernels, name)
    with pytest.raises(InputError, match="the plan has no kernel 'softmax': its kernels are add_rms_norm"):
        render_source(kernels, "softmax")
    assert render_kernels(()).startswith("No kernels")


def on_rank(made: Any, kernels: tuple[Kernel, ...], source: str, graph: ModelGraph) -> tuple[float, dict[str, Any], list[str]]:
    model = build(source)
    found = install(model, kernels)
    parallel = apply(made, model)
    inputs, labels = make_batch(graph, BATCH)
    loss = parallel.train_step(inputs, labels).item()
    return loss, {n: g.numpy() for n, g in parallel.full_gradients().items()}, list(found.done)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_kernels_run_under_tensor_parallelism(sources: dict[str, str], graphs: dict[str, ModelGraph], name: str) -> None:
    """Two ranks with sequence parallelism, through apply: converted inputs, local parameters, one process's numbers."""
    graph, source = graphs[name], sources[name]
    fix = {"tp": 2, "sp": True, "dp": 1, "pp": 1, "micro_batch": BATCH, "recompute": "none", "cp": 1}
    made = plan(graph, parse_cluster("2xcpu"), global_batch=BATCH, seq=SEQ, fix=fix)
    kernels = all_kernels(graph, 2, True)
    plain = build(source)
    inputs, labels = make_batch(graph, BATCH)
    out = main_output(plain(**inputs))
    assert out is not None
    wanted = torch.nn.functional.cross_entropy(out.flatten(0, -2).float(), labels.flatten())
    wanted.backward()
    grads = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    largest = max(g.abs().max().item() for g in grads.values())
    for loss, gradients, done in run(2, on_rank, made, kernels, source, graph):
        assert any(p.endswith("post_attention_layernorm") for p in done)
        assert any(p.endswith("self_attn") for p in done)
        assert abs(loss - wanted.item()) <= 1e-6 * wanted.item()
        assert max((torch.from_numpy(g) - grads[n]).abs().max().item() for n, g in gradients.items()) <= 5e-6 * largest
