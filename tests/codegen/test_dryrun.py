"""dry_run: what it answers, that shortening a stage changes nothing, what it refuses; and the verb."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
import transformers
from torch.testing._internal.distributed.fake_pg import FakeStore

from meshwright import cli
from meshwright.codegen.dryrun import DryRun, dry_run
from meshwright.planner.plan import Plan
from meshwright.planner.solve import plan
from meshwright.planner.space import parse_fix
from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import ModelGraph
from meshwright.profiling.trace import trace
from meshwright.report.dryrun import dry_run_document, render_dry_run
from tests.made_plans import recomputing

ROOT = Path(__file__).parent.parent.parent
WIDTHS = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 256,
    "max_position_embeddings": 64,
}  # fmt: skip
SEQ = 32


def write(folder: Path, config: transformers.PretrainedConfig, architecture: str) -> str:
    config.architectures = [architecture]
    path = folder / f"{architecture}.json"
    path.write_text(json.dumps(config.to_dict(), default=str))
    return str(path)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelGraph]:
    """A Llama of 12 layers, and a Qwen3-MoE of 12 that are dense and of experts by turns: two kinds of layer."""
    folder = tmp_path_factory.mktemp("models")
    moe = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8, "decoder_sparse_step": 2}
    llama = write(folder, transformers.LlamaConfig(**WIDTHS, num_hidden_layers=12), "LlamaForCausalLM")
    two = write(folder, transformers.Qwen3MoeConfig(**WIDTHS, **moe, num_hidden_layers=12), "Qwen3MoeForCausalLM")
    (folder / "deep").mkdir()
    deep = write(folder / "deep", transformers.LlamaConfig(**WIDTHS, num_hidden_layers=20), "LlamaForCausalLM")
    return {
        "llama": trace(llama, seq=SEQ, precision="bf16"),
        "two-kinds": trace(two, seq=SEQ, precision="bf16"),
        "deep": trace(deep, seq=SEQ, precision="bf16"),
    }


def planned(graph: ModelGraph, fix: str, batch: int = 32) -> Plan:
    fixed = {"cp": 1, "vpp": 1, "ep": 1, "replicas": 1, "schedule": "1f1b", **parse_fix(fix)}
    made = plan(graph, "8xH100-SXM", global_batch=batch, seq=SEQ, fix=fixed)
    assert isinstance(made, Plan), made
    return made


@pytest.fixture(scope="module")
def piped(graphs: dict[str, ModelGraph]) -> Plan:
    return planned(graphs["llama"], "pp=2,tp=2,sp=on,dp=2,zero=1,micro_batch=2")


SHORTENED = [
    ("llama", "dp=8,tp=1,pp=1,zero=3,recompute=full", 0),
    ("llama", "dp=8,tp=1,pp=1,zero=2,micro_batch=1", 0),
    ("llama", "pp=2,tp=2,sp=on,dp=2,zero=1,micro_batch=2", 0),
    ("llama", "pp=2,tp=2,sp=on,dp=2,zero=1,micro_batch=2", 7),
    ("llama", "pp=2,tp=1,dp=4,zero=2,micro_batch=1,recompute=selective", 3),
    ("two-kinds", "dp=8,tp=1,pp=1,zero=3,micro_batch=4", 0),
]


@pytest.mark.parametrize(("model", "fix", "rank"), SHORTENED)
def test_a_shortened_run_is_the_whole(graphs: dict[str, ModelGraph], model: str, fix: str, rank: int) -> None:
    """A few layers and microbatches extrapolate to the peak of all of them within 0.5 %, and to the very same collectives."""
    made = planned(graphs[model], fix)
    short, whole = dry_run(made, rank), dry_run(made, rank, whole=True)

    assert (short.layers_run, short.microbatches_run) < (whole.layers_run, whole.microbatches_run)
    assert short.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.005)
    assert sum(short.by_kind.values()) == pytest.approx(short.peak_bytes)
    assert counts(short) == counts(whole)


BY_STAGE: list[tuple[str, str, list[dict[str, object]], int]] = [
    ("llama", "dp=8,tp=1,pp=1,zero=3", [{"recompute": "full", "recompute_layers": 5}], 0),
    ("llama", "pp=2,tp=2,sp=on,dp=2,zero=1,micro_batch=2", [{"recompute": "full", "recompute_layers": 1}, {"recompute": "none"}], 0),
    ("llama", "pp=2,tp=2,sp=on,dp=2,zero=1,micro_batch=2", [{"recompute": "full", "recompute_layers": 1}, {"recompute": "none"}], 4),
    ("llama", "pp=2,tp=1,dp=4,zero=2,micro_batch=1", [{"recompute": "selective"}, {"recompute": "full", "recompute_layers": 4}], 0),
    ("llama", "pp=2,tp=1,dp=4,zero=2,micro_batch=1", [{"recompute": "selective"}, {"recompute": "full", "recompute_layers": 4}], 4),
    ("two-kinds", "dp=8,tp=1,pp=1,zero=3,micro_batch=4", [{"recompute": "full", "recompute_layers": 2}], 0),
]


@pytest.mark.parametrize(("model", "fix", "stages", "rank"), BY_STAGE)
def test_a_shortened_run_of_recompute_by_stage_is_the_whole(
    graphs: dict[str, ModelGraph], model: str, fix: str, stages: list[dict[str, object]], rank: int
) -> None:
    """Also where stages recompute differently, or some of their layers; each of them peaks as its own recompute has it."""
    plain = planned(graphs[model], f"{fix},recompute=none")
    made = recomputing(plain, stages)
    short, whole = dry_run(made, rank), dry_run(made, rank, whole=True)

    assert (short.layers_run, short.microbatches_run) < (whole.layers_run, whole.microbatches_run)
    assert short.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.005)
    assert counts(short) == counts(whole)
    other = dry_run(plain, rank).peak_bytes
    own = stages[rank // (8 // len(stages))]
    assert short.peak_bytes == other if own["recompute"] == "none" else short.peak_bytes < other


def test_a_shortened_gpipe_is_the_whole(piped: Plan) -> None:
    """Where every microbatch is in flight at once, what layers hold grows with them, and still extrapolates."""
    layout = piped.layout.model_copy(update={"schedule": "gpipe"})
    made = piped.model_copy(update={"solution": piped.solution.model_copy(update={"layout": layout})})
    short, whole = dry_run(made, 0), dry_run(made, 0, whole=True)

    assert (short.layers_run, short.microbatches_run) < (whole.layers_run, whole.microbatches_run)
    assert short.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.005)
    assert short.peak_bytes > dry_run(piped, 0).peak_bytes
    assert counts(short) == counts(whole)


LOOPED = [
    ("llama", "interleaved", 2, 40, 0), ("llama", "zero-bubble", 2, 48, 4), ("llama", "zero-bubble", 1, 32, 4), ("llama", "zbv", 2, 32, 0),
    ("llama", "dualpipev", 2, 32, 4), ("deep", "zbv", 2, 32, 0),
]  # fmt: skip


@pytest.mark.parametrize(("model", "schedule", "vpp", "batch", "rank"), LOOPED)
def test_a_shortened_schedule_is_the_whole(graphs: dict[str, ModelGraph], model: str, schedule: str, vpp: int, batch: int, rank: int) -> None:
    """The same with every schedule of a pipeline and several chunks a rank: each is run with microbatches that fill it."""
    made = planned(graphs[model], f"pp=2,vpp={vpp},schedule={schedule},tp=1,dp=4,zero=1,micro_batch=1,loss=plain", batch)
    short, whole = dry_run(made, rank), dry_run(made, rank, whole=True)

    assert short.microbatches_run < whole.microbatches_run
    assert (short.layers_run < whole.layers_run) == (model == "deep" or vpp == 1)
    assert len(short.chunks) == vpp
    assert short.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.005)
    assert counts(short) == counts(whole)


def test_experts_far_away(graphs: dict[str, ModelGraph]) -> None:
    """Tokens travel to the ranks of their experts, as many to each: twice a layer forward and twice backward."""
    made = planned(graphs["two-kinds"], "dp=8,ep=4,tp=1,pp=1,zero=1,micro_batch=4,recompute=none")
    found = dry_run(made, 0)
    sent = {(c.phase, c.ranks): c.count for c in found.collectives if c.op.startswith("all_to_all") and c.group == "ep"}

    layers = sum(len(e.layers) for e in made.solution.experts)
    assert 0 < layers < made.model.layers
    assert sent == {("forward", 4): 2 * layers, ("backward", 4): 2 * layers}


def test_offloaded_state_is_on_the_host(graphs: dict[str, ModelGraph]) -> None:
    """State of the optimizer that is offloaded counts as the host's, and comes to the device for one parameter at a time."""
    made = planned(graphs["llama"], "dp=8,tp=1,pp=1,zero=1,micro_batch=4,loss=plain,offload=none,state_dtype=fp32")
    layout = made.layout.model_copy(update={"offload": "optimizer"})
    offloaded = made.model_copy(update={"solution": made.solution.model_copy(update={"layout": layout})})
    there, here = dry_run(offloaded, 0), dry_run(made, 0)

    moments = here.by_kind["optimizer"]
    assert here.host_bytes == 0
    assert there.host_bytes == pytest.approx(moments, rel=0.01)
    assert there.peak_bytes == pytest.approx(here.peak_bytes - moments, rel=0.01)
    assert "optimizer" not in here.by_phase  # nothing is made there
    assert 0 < there.by_phase["optimizer"] < there.peak_bytes
    assert "in the host's memory" in render_dry_run(offloaded, there)


def counts(x: DryRun) -> dict[tuple[str, str, int, str], float]:
    return {(c.op, c.group, c.nbytes, c.phase): c.count for c in x.collectives if c.nbytes > 8}


def test_the_default_is_the_fullest_stage(piped: Plan) -> None:
    """Without a rank it is the first one of the stage that the plan calls fullest."""
    found = dry_run(piped)

    assert found.stage == piped.prediction.memory_bytes.peak_stage
    assert found.rank == found.stage * 4


def test_parameters_and_gradients_are_as_planned(piped: Plan) -> None:
    """A rank holds its share of the weights in fp32, a gathered copy in bf16 and the optimizer's two moments."""
    held = dry_run(piped, 0).by_kind
    share = held["parameters"]

    assert held["optimizer"] == pytest.approx(2 * share, rel=0.01)
    assert held["gathered"] == pytest.approx(share, rel=0.02)  # 2 bytes instead of 4, of two ranks


@pytest.mark.parametrize("rank", [-1, 8])
def test_a_rank_that_is_not_there(piped: Plan, rank: int) -> None:
    """A rank outside the plan's is refused with the ranks that there are."""
    with pytest.raises(InputError, match="its 8 ranks are 0 to 7"):
        dry_run(piped, rank)


def test_a_process_group_that_is_there(piped: Plan) -> None:
    """A dry run does not touch a process group that somebody uses."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(InputError, match="process group of its own"):
            dry_run(piped)
    finally:
        dist.destroy_process_group()


def test_a_model_that_changed(graphs: dict[str, ModelGraph], tmp_path: Path) -> None:
    """A config that was edited since the plan is refused with both sizes."""
    path = tmp_path / "llama.json"
    path.write_text(Path(graphs["llama"].source).read_text())
    made = planned(trace(str(path), seq=SEQ, precision="bf16"), "dp=8,tp=1,pp=1")
    path.write_text(path.read_text().replace('"intermediate_size": 128', '"intermediate_size": 160'))

    with pytest.raises(InputError, match=r"the plan is for llama with .* parameters; .* now has .*: plan again"):
        dry_run(made)


def test_shapes_that_do_not_fit_name_the_module(piped: Plan) -> None:
    """A program that cannot run is one sentence with the rank, the module, the operator and the shapes; the process group is gone."""
    groups = []
    for g in piped.solution.layer_shardings:
        modules = [m.model_copy(update={"outputs": {}}) if m.module.endswith("o_proj") else m for m in g.modules]
        groups.append(g.model_copy(update={"modules": tuple(modules)}))
    broken = piped.model_copy(update={"solution": piped.solution.model_copy(update={"layer_shardings": tuple(groups)})})

    with pytest.raises(InputError) as refused:
        dry_run(broken, 0)
    text = str(refused.value)
    assert text.startswith("the plan's program does not run as rank 0: model.layers.")
    assert "aten.add.Tensor of [2, 16, 64], [2, 32, 64]: " in text
    assert not dist.is_initialized()


def test_experts_in_fp32(graphs: dict[str, ModelGraph]) -> None:
    """Grouped products, whose fake kernel refuses fp32, run in it."""
    graph = trace(graphs["two-kinds"].source, seq=SEQ, precision="fp32")
    made = plan(graph, "2xcpu", global_batch=4, seq=SEQ, fix={"dp": 2, "zero": 3})
    assert isinstance(made, Plan)

    assert dry_run(made, 1).peak_bytes > 0


def test_a_model_without_a_program() -> None:
    """A model whose code around the layers is not known runs whole, on one stage."""
    made = plan(f"{ROOT}/examples/models/unet.py:build", "8xH100-SXM", global_batch=64, seq=1, fix={"dp": 8, "zero": 2})
    assert isinstance(made, Plan)
    found = dry_run(made)

    assert found.layers_run == found.layers[1] - found.layers[0]
    assert found.by_kind["activations"] > 0


def test_text_and_document(piped: Plan) -> None:
    """The text answers in its first line and is at most 100 columns wide; the document has the plan's own figures beside it."""
    found = dry_run(piped, 4)
    text, document = render_dry_run(piped, found), dry_run_document(piped, found)

    assert text.splitlines()[0].startswith(f"Peak  {found.peak_bytes / 2**20:.1f} MiB live on rank 4 of 8; fits: ")
    assert max(map(len, text.splitlines())) <= 100
    names = [line.split("  ")[0] for line in text.partition("memory at the peak")[2].partition("\nsum")[0].splitlines()[2:]]
    assert len(set(names)) == len(names)
    for part in ("stage 1 of 2", "memory at the peak", "reduce_scatter", "Fullest moment by phase", "taken from the plan"):
        assert part in text
    assert document["peak_bytes"] == found.peak_bytes
    assert document["predicted_bytes"] == piped.solution.stages[1].peak_bytes
    assert document["fits"]


def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["meshwright", "dryrun", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capfd.readouterr()
    return int(stopped.value.code or 0), out, err


def test_verb(piped: Plan, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The verb prints JSON and saves the same; a rank or a plan that is not there is one sentence and exit code 2."""
    path, saved = str(tmp_path / "plan.json"), tmp_path / "dry.json"
    Path(path).write_text(piped.to_json())
    code, out, _ = call(capfd, monkeypatch, path, "--rank", "4", "--json", "-o", str(saved))

    assert code == 0
    assert json.loads(out) == json.loads(saved.read_text())
    assert json.loads(out)["stage"] == 1

    for wrong, words in (
        ((path, "--rank", "8"), "its 8 ranks are 0 to 7"),
        ((path, "--rank", "-2"), "its 8 ranks are 0 to 7"),
        ((path, "-o", str(tmp_path / "no" / "dry.json")), "does not exist"),
        ((str(tmp_path / "none.json"),), "none.json"),
    ):
        code, out, err = call(capfd, monkeypatch, *wrong)
        assert (code, out) == (2, "")
        assert err.splitlines()[-1].startswith("meshwright: ")
        assert words in err.splitlines()[-1]
