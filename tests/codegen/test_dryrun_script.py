"""dry_run_script: the script that emit wrote, at full scale without its ranks, for plans of the kind that large models get."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from meshwright import cli
from meshwright.codegen.dryrun import dry_run
from meshwright.codegen.dryrun_script import dry_run_script
from meshwright.codegen.emit import emit
from meshwright.planner.plan import Plan
from meshwright.planner.solve import plan
from meshwright.planner.space import parse_fix
from meshwright.profiling.errors import InputError
from meshwright.report.dryrun import render_dry_run

SEQ = 32
WIDTHS: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 256,
    "max_position_embeddings": 64,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 4, "topk_group": 2,
    "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
MODELS = {
    "llama": (transformers.LlamaConfig, "LlamaForCausalLM", {**WIDTHS, "num_hidden_layers": 8}),
    "deepseek": (transformers.DeepseekV3Config, "DeepseekV3ForCausalLM", {**WIDTHS, **LATENT, "num_hidden_layers": 4}),
}
# as the planner lays out Llama 3.1 405B on 16,384 devices and DeepSeek-V3 on 2,048, with smaller degrees
KINDS = {
    "llama": ("8x8xH100-SXM", 16, "tp=4,sp=on,cp=2,cp_kind=ring,pp=2,vpp=3,zero=1,replicas=2,micro_batch=1,schedule=zero-bubble"),
    "deepseek": ("4x8xH100-SXM", 64, "tp=1,cp=2,cp_kind=ulysses,ep=4,pp=2,vpp=1,zero=1,micro_batch=1,recompute=selective,schedule=1f1b"),
}


@pytest.fixture(scope="module", params=list(KINDS))
def emitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    config, architecture, widths = MODELS[request.param]
    made = config(**widths, architectures=[architecture])
    (folder / "model.json").write_text(json.dumps(made.to_dict(), default=str))
    cluster, batch, fix = KINDS[request.param]
    found = plan(str(folder / "model.json"), cluster, global_batch=batch, seq=SEQ, fix=parse_fix(fix))
    assert isinstance(found, Plan), found
    emit(found, folder / "run")
    return found, folder / "run"


@pytest.mark.parametrize("which", ["first", "middle", "last"])
def test_the_script_is_the_plan(emitted: tuple[Plan, Path], which: str) -> None:
    """The emitted script runs as the first, a middle and the last rank, and holds and sends what apply's program does."""
    made, folder = emitted
    n = made.layout.devices
    rank = {"first": 0, "middle": n // 2, "last": n - 1}[which]
    script, program = dry_run_script(folder, rank), dry_run(made, rank)

    whole_samples = 2 * 8 * made.microbatches * made.layout.micro_batch * SEQ  # tokens and labels, which the script cuts up and lets go
    assert script.peak_bytes == pytest.approx(program.peak_bytes, abs=whole_samples)
    sent = [{(c.op, c.group, c.nbytes): c.count for c in x.collectives if c.nbytes > 8} for x in (script, program)]
    assert sent[0] == sent[1]
    assert f"the script {folder}/train.py" in " ".join(render_dry_run(made, script).split())


def test_verb(emitted: tuple[Plan, Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`meshwright dryrun` takes the folder, runs the script there and says so."""
    monkeypatch.setattr(sys, "argv", ["meshwright", "dryrun", str(emitted[1]), "--rank", "1", "--json"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    found = json.loads(capfd.readouterr().out)

    assert stopped.value.code in (0, None)
    assert (found["script"], found["rank"]) == (str(emitted[1]), 1)


def test_nothing_of_the_folder_stays(emitted: tuple[Plan, Path]) -> None:
    """Afterwards its modules are forgotten and the search path is as it was."""
    path = list(sys.path)
    dry_run_script(emitted[1], 0)

    assert sys.path == path
    assert not {"train", "runtime", "tables"} & set(sys.modules)


def test_shapes_that_do_not_fit(emitted: tuple[Plan, Path]) -> None:
    """A script that was edited and no longer runs is one sentence with the module and the shapes."""
    folder = emitted[1]
    text = (folder / "train.py").read_text()
    (folder / "train.py").write_text(text.replace("return h\n", "return h[:, 1:]\n", 1))
    try:
        with pytest.raises(InputError, match="does not run as rank 0: "):
            dry_run_script(folder, 0)
    finally:
        (folder / "train.py").write_text(text)


def test_a_folder_without_a_script(tmp_path: Path) -> None:
    """A folder that emit did not write is refused."""
    with pytest.raises(InputError, match="has no train.py: name a folder that `meshwright emit` wrote"):
        dry_run_script(tmp_path)
