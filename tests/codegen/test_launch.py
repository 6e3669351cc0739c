"""Launchers, Slurm, and what is written for other engines: right degrees, and nothing of a plan lost in silence."""

from __future__ import annotations

import ast
import json
import os
import random
import re
import subprocess
import tomllib
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import transformers

from meshwright import cli
from meshwright.codegen.launch.engine import Engine, configure, write
from meshwright.codegen.launch.torchrun import launcher, slurm
from meshwright.planner.plan import Layout, Plan, Stage, Workload
from meshwright.planner.search import Search
from meshwright.planner.solve import _assemble, plan
from meshwright.planner.space import FIXABLE, Space, parse_fix
from meshwright.profiling.cluster import Cluster, Host, Node, parse_cluster
from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import ModelGraph
from meshwright.profiling.trace import trace

ROOT = Path(__file__).parent.parent.parent
GOLDENS = Path(__file__).parent / "goldens" / "launch"
SEQ, BATCH = 32, 16
WIDTHS = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 256, "head_dim": 8,
    "max_position_embeddings": 64, "num_hidden_layers": 4, "tie_word_embeddings": False,
}  # fmt: skip
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
CONFIGS: dict[str, tuple[type[transformers.PretrainedConfig], dict[str, Any]]] = {
    "LlamaForCausalLM": (transformers.LlamaConfig, {}), "Qwen3MoeForCausalLM": (transformers.Qwen3MoeConfig, MOE),
}  # fmt: skip
ENGINES = ("torchtitan", "megatron", "deepspeed")


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    host = Host(memory_bytes=1e12, bandwidth_Bps=2e10)
    return Cluster.model_validate({**parse_cluster("8xH100-SXM").model_dump(), "host": host})


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelGraph]:
    made = {}
    for name, (config, more) in CONFIGS.items():
        path = tmp_path_factory.mktemp("models") / f"{name}.json"
        path.write_text(json.dumps({**config(**WIDTHS, **more).to_dict(), "architectures": [name]}, default=str))
        made[name] = trace(str(path), seq=SEQ, precision="bf16")
    return made


def planned(graph: ModelGraph, cluster: Cluster, fix: str) -> Plan:
    made = plan(graph, cluster, global_batch=BATCH, seq=SEQ, precision="bf16", fix=parse_fix(fix))
    assert isinstance(made, Plan)
    return made


def cut(made: Plan, *spans: tuple[int, int]) -> Plan:
    """The plan with its layers cut so, and recompute in full: what the planner prefers may change, what is written for it may not."""
    stages = tuple(Stage(layers=s, recompute="full", peak_bytes=1, microbatch_s=1) for s in spans)
    layout = made.layout.model_copy(update={"recompute": "full"})
    solution = made.solution.model_copy(update={"stages": stages, "layout": layout})
    return made.model_copy(update={"solution": solution, "alternatives": ()})


# --- torchrun and Slurm ------------------------------------------------------------------------------------------------


def test_slurm_starts_torchrun_once_a_node(graphs: dict[str, ModelGraph], tmp_path: Path) -> None:
    """slurm.sh asks for the plan's nodes and GPUs, takes the first host as the place to meet, and passes arguments on; each node starts
    its own ranks with the environment of launch.sh. srun, scontrol and torchrun are stand-ins."""
    made = planned(graphs["LlamaForCausalLM"], parse_cluster("2x4xH100-SXM"), "tp=2,sp=on,pp=1,dp=4,zero=1,cp=1")
    (tmp_path / "launch.sh").write_text(launcher(made))
    (tmp_path / "slurm.sh").write_text(slurm(made))
    stand_ins = {
        "scontrol": 'echo "$@" >&2; printf "node7\\nnode8\\n"',
        "srun": 'for a in "$@"; do [ "$a" = bash ] && break; shift; done\nfor i in 0 1; do SLURM_NODEID=$i "$@"; done',
        "torchrun": 'echo "torchrun $* alloc=$PYTORCH_ALLOC_CONF omp=$OMP_NUM_THREADS"',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "21", "SLURM_JOB_NODELIST": "node[7-8]"}
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **job}
    checked = [subprocess.run(["bash", "-n", str(tmp_path / n)], capture_output=True, text=True) for n in ("slurm.sh", "launch.sh")]
    ran = subprocess.run(["bash", str(tmp_path / "slurm.sh"), "--steps", "7"], capture_output=True, text=True, env=environment)
    lines = ran.stdout.splitlines()

    assert [c.stderr for c in checked] == ["", ""]
    assert ran.returncode == 0, ran.stderr
    for i, line in enumerate(lines):
        assert f"--nnodes 2 --nproc-per-node 4 --node-rank {i} --master-addr node7 --master-port 20021 {tmp_path}/train.py --steps 7" in line
        assert "alloc=expandable_segments:True omp=1" in line
    assert len(lines) == 2
    for asked in ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4"):
        assert f"#SBATCH {asked}" in (tmp_path / "slurm.sh").read_text()


def test_slurm_on_one_node_and_elsewhere(graphs: dict[str, ModelGraph], tmp_path: Path) -> None:
    """On one CPU node there are no GPUs to ask for; outside sbatch the script says how it is meant."""
    made = planned(graphs["LlamaForCausalLM"], parse_cluster("4xcpu"), "tp=2,sp=on,pp=1,dp=2,zero=0,cp=1")
    text = slurm(made)
    (tmp_path / "slurm.sh").write_text(text)
    ran = subprocess.run(["bash", str(tmp_path / "slurm.sh")], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})

    assert "#SBATCH --nodes=1" in text
    assert "--gpus" not in text
    assert "torchrun --standalone --nproc-per-node 4" in launcher(made)
    assert ran.returncode != 0
    assert "this script is for sbatch" in ran.stderr


def test_unequal_nodes_are_refused(graphs: dict[str, ModelGraph]) -> None:
    """Nodes of 2 and of 6 devices cannot be started alike: one sentence with both numbers."""
    mixed = Cluster(name="mixed", nodes=(Node(device="H100-SXM", devices=2), Node(device="H100-SXM", devices=6)))
    made = planned(graphs["LlamaForCausalLM"], mixed, "tp=2,sp=on,pp=1,cp=1")
    for write_it, name in ((launcher, "launch.sh"), (slurm, "slurm.sh")):
        with pytest.raises(InputError, match=f"{name} needs nodes with equal numbers of devices; those of mixed have 2 and 6"):
            write_it(made)


# --- other engines -----------------------------------------------------------------------------------------------------

Read = dict[str, set[Any]]  # of each part of a layout, what the engine's files may stand for


def read_torchtitan(engine: Engine) -> Read:
    t = tomllib.loads(engine.files["train.toml"])
    p, training = t["parallelism"], t["training"]
    names = ("data_parallel_replicate", "data_parallel_shard", "context_parallel", "pipeline_parallel", "tensor_parallel")
    replicate, shard, cp, pp, tp = (p[f"{k}_degree"] for k in names)
    fsdp = shard * cp > 1
    schedules = {
        "1F1B": "1f1b", "GPipe": "gpipe", "Interleaved1F1B": "interleaved", "InterleavedZeroBubble": "zero-bubble", "ZBVZeroBubble": "zbv",
        "DualPipeV": "dualpipev",
    }  # fmt: skip
    return {
        "tp": {tp}, "sp": {tp > 1}, "cp": {cp}, "cp_kind": {"ring"} if cp > 1 else {"ring", "ulysses"}, "pp": {pp},
        "vpp": {len(p["module_fqns_per_model_part"]) // pp if pp > 1 else 1}, "dp": {replicate * shard},
        "zero": {"always": {3}, "never": {1, 2}}[p["fsdp_reshard_after_forward"]] if fsdp else {0},
        "replicas": {replicate if fsdp else 1, *([1] if shard == 1 else [])}, "ep": {p["expert_parallel_degree"]},
        "etp": {p["expert_tensor_parallel_degree"]} if p["expert_parallel_degree"] > 1 or "MoEArgs" not in engine.files["planned.py"] else {tp},
        "micro_batch": {p["pipeline_parallel_microbatch_size"] if pp > 1 else training["local_batch_size"]},
        "recompute": {t["activation_checkpoint"]["mode"]} - {"selective"}, "schedule": {schedules[p.get("pipeline_parallel_schedule", "1F1B")]},
        "loss": {"plain"} if p["disable_loss_parallel"] else {"vocab_parallel"}, "state_dtype": {"fp32"}, "offload": {"none"},
    }  # fmt: skip


def megatron_arguments(engine: Engine, tmp_path: Path) -> dict[str, list[str]]:
    """As bash reads them: each option with its values."""
    (tmp_path / "arguments.sh").write_text(engine.files["arguments.sh"])
    line = 'set -eu; source "$0"; printf "%s\\n" "${MODEL[@]}" "${LAYOUT[@]}" "${TRAINING[@]}" "${DATA[@]}"'
    words = subprocess.run(["bash", "-c", line, str(tmp_path / "arguments.sh")], capture_output=True, text=True, check=True).stdout.splitlines()
    found: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            assert word not in found, f"{word} is there twice"
            found[word] = values = []
        else:
            values.append(word)
    return found


def read_megatron(engine: Engine, tmp_path: Path, layers: int = 4) -> Read:
    a = megatron_arguments(engine, tmp_path)

    def number(option: str) -> int:
        return int(a.get(option, ["1"])[0])

    tp, pp, cp = (number(f"--{k}-size") for k in ("tensor-model-parallel", "pipeline-model-parallel", "context-parallel"))
    vpp = layers // pp // number("--num-layers-per-virtual-pipeline-stage") if "--num-layers-per-virtual-pipeline-stage" in a else 1
    if "--pipeline-model-parallel-layout" in a:
        vpp = len(a["--pipeline-model-parallel-layout"][0].split("|")) // pp
    sharded = a.get("--data-parallel-sharding-strategy", [""])[0]
    zero = {"optim_grads": 2, "optim_grads_params": 3}.get(sharded, int("--use-distributed-optimizer" in a))
    mode = a.get("--recompute-granularity", ["none"])[0]
    return {
        "tp": {tp}, "sp": {"--sequence-parallel" in a}, "cp": {cp}, "pp": {pp}, "vpp": {vpp}, "dp": {8 // (tp * pp * cp)},
        "cp_kind": {{"a2a": "ulysses", "p2p": "ring"}[a["--cp-comm-type"][0]]} if cp > 1 else {"ring", "ulysses"},
        "zero": {zero} if 8 // (tp * pp) > 1 else {0, zero}, "replicas": {number("--num-distributed-optimizer-instances")},
        "ep": {number("--expert-model-parallel-size")}, "etp": {number("--expert-tensor-parallel-size")},
        "micro_batch": {number("--micro-batch-size")},
        "recompute": {"full": {"full", "by stage"}, "selective": set(), "none": {"none"}}[mode], "schedule": {"interleaved" if vpp > 1 else "1f1b"},
        "loss": {"vocab_parallel"} if tp > 1 else {"plain"}, "state_dtype": {a.get("--exp-avg-dtype", ["fp32"])[0]},
        "offload": {"optimizer" if "--optimizer-cpu-offload" in a else "none"},
    }  # fmt: skip


def read_deepspeed(engine: Engine) -> Read:
    c = json.loads(engine.files["ds_config.json"])
    z, tp = c["zero_optimization"], c.get("tensor_parallel", {}).get("autotp_size", 1)
    ast.parse(engine.files["train.py"])
    return {
        "tp": {tp}, "sp": {False}, "cp": {1}, "cp_kind": {"ring", "ulysses"}, "pp": {1}, "vpp": {1},
        "dp": {c["train_batch_size"] // (c["train_micro_batch_size_per_gpu"] * c["gradient_accumulation_steps"])},
        "zero": {z["stage"]}, "replicas": {1},
        "ep": {c.get("expert_parallel", {}).get("autoep_size", 1)}, "etp": {1}, "micro_batch": {c["train_micro_batch_size_per_gpu"]},
        "recompute": {"full"} if "gradient_checkpointing_enable" in engine.files["train.py"] else {"none"}, "schedule": {"1f1b", "gpipe"},
        "loss": {"plain"}, "state_dtype": {"fp32"}, "offload": {"optimizer" if "offload_optimizer" in z else "none"},
    }  # fmt: skip


READERS: dict[str, Callable[[Engine, Path], Read]] = {
    "torchtitan": lambda e, _: read_torchtitan(e), "megatron": read_megatron, "deepspeed": lambda e, _: read_deepspeed(e),
}  # fmt: skip


def some_layouts(space: Space, count: int) -> list[Layout]:
    """Layouts of a space in which every value of every part occurs, others by chance, and as many again of what each engine may run."""
    every = list(space.layouts())
    random.Random(7).shuffle(every)
    seen: set[tuple[str, Any]] = set()
    kept = []
    for x in every:
        values = {(k, getattr(x, k)) for k in Layout.model_fields}
        if values - seen:
            kept.append(x)
            seen |= values
    plain = [x for x in every if x.pp == x.cp == x.etp == 1 and (x.ep > 1 or x.tp == 1 or space.moe is None)]
    return [*kept, *every[:count], *plain[:count]]


def plan_with(space: Space, x: Layout) -> Plan:
    """The plan of one layout, as plan_of has it, with blocks that are sharded once for all."""
    held = space.holding({k: getattr(x, k) for k in FIXABLE if k != "recompute"})
    search = Search(held, space.cluster.device.memory_bytes)
    return _assemble(search, search.run(1), space.cluster.device.memory_bytes)


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_is_lost_in_silence(graphs: dict[str, ModelGraph], cluster: Cluster, name: str, tmp_path: Path) -> None:
    """Over layouts from the space itself: reading an engine's files back gives the plan's layout, or the part that differs is named among
    what is lost; degrees multiply to the world; a refusal is a sentence that names the engine."""
    space = Space(graphs[name], cluster, Workload(global_batch=BATCH, seq=SEQ))
    written = dict.fromkeys(ENGINES, 0)
    refusals = []
    for x in some_layouts(space, 20):
        made = plan_with(space, x)
        for engine in ENGINES:
            try:
                found = configure(made, engine)
            except InputError as e:
                refusals.append(str(e))
                continue
            written[engine] += 1
            read = READERS[engine](found, tmp_path)
            wrong = {k: (getattr(made.layout, k), read[k]) for k in Layout.model_fields if getattr(made.layout, k) not in read[k]}
            told = {sentence.partition("=")[0] for sentence in found.lost}

            assert set(wrong) <= told, (str(made.layout), engine, wrong, found.lost)
            assert prod(max(read[k]) for k in ("tp", "cp", "pp", "dp")) == 8
            assert "--nproc-per-node 8" in found.files["run.sh"]
    assert min(written.values()) >= 5, written
    assert refusals
    assert all(re.match(r"(torchtitan|Megatron-LM core_r|DeepSpeed) ?[\d.]+ ", r) for r in refusals), refusals


CASES = {
    "dense": ("LlamaForCausalLM", "tp=2,sp=on,pp=2,dp=2,zero=1,replicas=1,cp=1,schedule=1f1b,micro_batch=2,offload=none", ((0, 1), (1, 4))),
    "dense-one-stage": ("LlamaForCausalLM", "tp=2,sp=on,pp=1,dp=4,zero=2,replicas=1,cp=1,micro_batch=2,offload=none", ((0, 4),)),
    "moe": ("Qwen3MoeForCausalLM", "tp=2,sp=on,pp=1,dp=4,cp=1,ep=4,etp=1,zero=3,replicas=1,micro_batch=2,offload=none", ((0, 4),)),
}
GOLDEN = [(e, c) for e in ENGINES for c in ("dense-one-stage" if e == "deepspeed" else "dense", "moe")]


@pytest.mark.parametrize(("engine", "case"), GOLDEN)
def test_files_are_as_kept(graphs: dict[str, ModelGraph], cluster: Cluster, engine: str, case: str) -> None:
    """A dense plan and one with experts, in each engine's own words; the launcher, and what is lost."""
    name, fix, spans = CASES[case]
    found = configure(cut(planned(graphs[name], cluster, fix), *spans), engine)
    shown = {k: v for k, v in found.files.items() if k != "config.json"} | {"lost": "\n".join(found.lost) + "\n"}
    text = "".join(f"=== {k}\n{v}" for k, v in shown.items()).replace(f"{graphs[name].name}", "MODEL")
    kept = GOLDENS / f"{engine}-{case}.txt"
    if os.environ.get("UPDATE_GOLDENS"):
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(text)

    assert text == kept.read_text()
    assert subprocess.run(["bash", "-n"], input=found.files["run.sh"], capture_output=True, text=True).stderr == ""


def test_uneven_stages_are_written_out(graphs: dict[str, ModelGraph], cluster: Cluster, tmp_path: Path) -> None:
    """Stages of one and of three layers reach both engines that pipeline, with embedding and loss at the ends."""
    name, fix, spans = CASES["dense"]
    made = cut(planned(graphs[name], cluster, fix), *spans)
    parts = tomllib.loads(configure(made, "torchtitan").files["train.toml"])["parallelism"]["module_fqns_per_model_part"]
    arguments = megatron_arguments(configure(made, "megatron"), tmp_path)

    assert parts == [["tok_embeddings", "layers.0"], ["layers.1", "layers.2", "layers.3", "norm", "output"]]
    assert arguments["--pipeline-model-parallel-layout"] == ["Et|t*3L"]


@pytest.mark.parametrize(
    ("model", "engine", "fix", "words"),
    [
        ("gpt-3-175b.json", "torchtitan", "", "torchtitan 0.2.2 has no GPT2LMHeadModel"),
        ("mixer.py:build", "megatron", "", "builds its own models, of a Hugging Face config"),
        ("tiny-llama.json", "deepspeed", "pp=2", "pipelines a model only where it is written as a list of layers"),
        ("tiny-llama.json", "torchtitan", "tp=2,dp=4,pp=1,zero=0", "replicates data-parallel ranks only where nothing else is parallel"),
        ("tiny-llama.json", "deepseed", "", "--for 'deepseed' is not known: it is torchtitan, megatron or deepspeed"),
    ],
)
def test_what_an_engine_cannot_run_is_refused(
    model: str, engine: str, fix: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, one sentence, and no folder."""
    small = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256}
    source = ROOT / "examples/models" / model
    if model.startswith("gpt"):
        config = json.loads(source.read_text())
        source = tmp_path / model
        source.write_text(json.dumps({**config, **small}))
    seq = 64 if model.startswith("mixer") else SEQ
    made = plan(str(source), "8xH100-SXM", global_batch=BATCH, seq=seq, fix=parse_fix(fix))
    assert isinstance(made, Plan)
    made.save(tmp_path / "plan.json")
    monkeypatch.setattr("sys.argv", ["meshwright", "emit", str(tmp_path / "plan.json"), "--for", engine, "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capfd.readouterr()

    assert stopped.value.code == 2
    assert out == ""
    assert words in err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_emit_for_an_engine(
    graphs: dict[str, ModelGraph], cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The folder holds the plan, the engine's files and run.sh; what is printed lists them, the command and what is lost, also as JSON."""
    made = planned(graphs["LlamaForCausalLM"], cluster, CASES["dense"][1])
    made.save(tmp_path / "plan.json")
    shown = []
    for more in ([], ["--json"]):
        monkeypatch.setattr("sys.argv", ["meshwright", "emit", str(tmp_path / "plan.json"), "--for", "megatron", "-o", str(tmp_path / "out"), *more])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code
        shown.append(capfd.readouterr().out)
    told = json.loads(shown[1])

    assert Plan.load(tmp_path / "out/plan.json") == made
    assert sorted(Path(f).name for f in told["files"]) == ["arguments.sh", "plan.json", "run.sh", "slurm.sh"]
    assert told["lost"] == list(configure(made, "megatron").lost)
    assert "Lost or otherwise" in shown[0]
    assert f"Next: cd {tmp_path / 'out'} && {told['command']}" in shown[0]
    assert max(len(line) for line in shown[0].splitlines() if str(tmp_path) not in line) <= 100


def test_other_folders_are_left_alone(graphs: dict[str, ModelGraph], cluster: Cluster, tmp_path: Path) -> None:
    """A folder without a plan is refused and kept; one with a plan is replaced whole."""
    made = planned(graphs["LlamaForCausalLM"], cluster, CASES["dense"][1])
    found = configure(made, "megatron")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not written by emit"):
        write(made, found, tmp_path / "mine")
    write(made, found, tmp_path / "out")
    (tmp_path / "out/old.txt").write_text("old")
    write(made, found, tmp_path / "out")

    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]
    assert not (tmp_path / "out/old.txt").exists()
