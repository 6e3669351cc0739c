"""Galvatron's JSON profiles become a layer profile, and what is broken in them is said in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from meshwright.profiling.errors import InputError
from meshwright.profiling.importers.galvatron import read_galvatron
from meshwright.profiling.layerprofile import Strategy, read_layer_profile, write_layer_profile

ENDS = {"512": {"model_states": {"1": 400.0, "2": 200.0}, "activation": {"1": 40.0, "2": 20.0}}}
FILES: dict[str, Any] = {
    "computation_profiling_bf16_tiny_all.json": {
        "layernum[2]_bsz1_seq512": 9.0,
        "layertype_0_bsz1_seq512": 3.0, "layertype_0_bsz2_seq512": 2.5, "layertype_other_bsz1_seq512": 2.0, "layertype_other_bsz2_seq512": 1.5,
    },
    "memory_profiling_bf16_tiny_all.json": {
        "layertype_0_sp": {"512": {"parameter_size": 48.0, "tp_activation_per_bsz_dict": {"1": 80.0, "2": 41.0, "checkpoint": 8.0}}},
        "other_memory_pp_off_sp": ENDS, "other_memory_pp_on_first_sp": ENDS, "other_memory_pp_on_last_sp": ENDS,
    },
    "allreduce_bandwidth_1nodes_2gpus_per_node.json": {"allreduce_size_2_consec_1": 100.0},
    "allreduce_bandwidth_2nodes_2gpus_per_node.json": {
        "allreduce_size_4_consec_1": 10.0, "allreduce_size_2_consec_1": 100.0, "allreduce_size_2_consec_0": 11.0,
    },
    "p2p_bandwidth_1nodes_2gpus_per_node.json": {"pp_size_2": 90.0},
    "sp_time_1nodes_2gpus_per_node.json": {"allreduce_size_2_1MB_time": 0.07, "all2all_size_2_16MB_time": 0.2},
    "overlap_coefficient.json": {"overlap_coe": 1.1},
    "galvatron_config_tiny_1nodes_2gpus_per_node_16GB_bf16_bsz8.json": {
        "pp_deg": 1, "tp_sizes_enc": "1,2,2", "dp_types_enc": "1,0,0", "use_sp": "0,0,1", "checkpoint": "0,1,0", "world_size": 2, "global_bsz": 8,
        "chunks": 2, "pp_division": "3", "default_dp_type": "zero2", "vtp": 2, "vsp": 1, "embed_sdp": 0,
    },
}  # fmt: skip


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "meshwright", *args], capture_output=True, text=True, timeout=120)


def write(folder: Path, **changes: Any) -> Path:
    """The files, with some of them (by the start of their names) replaced by a value, a text or nothing."""
    folder.mkdir(exist_ok=True)
    for name, rows in FILES.items():
        changed = next((k for k in changes if name.startswith(k)), None)
        rows = changes[changed] if changed else rows
        if rows is not None:
            (folder / name).write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return folder


def test_figures_keep_their_meaning(tmp_path: Path) -> None:
    """ms a sample becomes seconds of so many samples, ms becomes seconds, and each cluster is an entry."""
    made = read_galvatron([write(tmp_path)])
    assert made.layer is not None
    assert made.vocab is not None
    assert made.layer.forward_s == {1: pytest.approx(0.003), 2: pytest.approx(0.005)}
    assert made.vocab.forward_s == {1: pytest.approx(0.002), 2: pytest.approx(0.003)}
    assert (made.layer.parameters_MB, made.layer.activation_MB, made.layer.checkpoint_MB) == (48.0, {1: 80.0, 2: 41.0}, 8.0)
    assert (made.model, made.precision, made.sequence, made.layers, made.overlap) == ("tiny", "bf16", 512, 3, 1.1)
    one, two = made.clusters
    assert (one.devices, one.p2p_GBps, one.consecutive_GBps) == (2, {2: 90.0}, {2: 100.0})
    assert one.allreduce_s == {2: {1: pytest.approx(7e-5)}}
    assert one.all_to_all_s == {2: {16: pytest.approx(2e-4)}}
    assert (two.devices, two.strided_GBps, two.p2p_GBps) == (4, {2: 11.0}, {})
    assert made.links(4) is two


def test_its_chosen_plan_is_read(tmp_path: Path) -> None:
    """Degrees, Ulysses, ZeRO and checkpoints of every layer; a single replica has nothing to shard over."""
    made = read_galvatron([write(tmp_path)])
    assert made.plan is not None
    assert made.plan.layers == (Strategy(1, 2, zero=3), Strategy(2, 1, checkpoint=True), Strategy(2, 1, ulysses=True))
    assert made.plan.vocab == Strategy(2, 1, ulysses=True)
    assert (made.plan.cut, made.plan.microbatches, made.plan.batch, made.plan_limit_MB) == ((3,), 2, 8, 16384.0)


def test_a_profile_reads_back_as_it_was(tmp_path: Path) -> None:
    """YAML round trip."""
    made = read_galvatron([write(tmp_path)])
    write_layer_profile(made, tmp_path / "layers.yaml")
    assert read_layer_profile(tmp_path / "layers.yaml") == made


def test_model_and_cluster_may_lie_apart(tmp_path: Path) -> None:
    """Two folders make one profile; a folder without layers says what is not there."""
    whole = read_galvatron([write(tmp_path / "all")])
    model = write(tmp_path / "model", **dict.fromkeys(("allreduce", "p2p", "sp_time", "overlap", "galvatron")))
    cluster = write(tmp_path / "cluster", computation={"layernum[2]_bsz1_seq512": 9.0}, memory=None)
    assert read_galvatron([cluster, model]).model_copy(update={"provenance": {}}) == whole.model_copy(update={"provenance": {}})
    alone = read_galvatron([cluster])
    assert alone.provenance["not_used"] == ["computation_profiling_bf16_tiny_all.json"]
    assert alone.missing() == ["the layer's times and memory", "the times and memory of embedding and head", "the hidden size"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"computation": "{"}, "is not JSON"),
        ({"computation": "[1]"}, "holds list, not an object"),
        ({"computation": {"layertype_0_bsz1_seq512": "x", "layertype_other_bsz1_seq512": 1.0}}, "layertype_0_bsz1_seq512 is 'x', not a figure"),
        ({"computation": {"layertype_0_bsz1_seq512": 1.0}}, "no layertype_other_bsz*_seq512"),
        ({"computation": {"layertype_0_bsz1_seq512": 1.0, "layertype_0_bsz1_seq64": 1.0}}, "2 sequence lengths [64, 512]"),
        ({"memory": {"layertype_0_sp": {}}}, "no layertype_0_sp of sequence 512"),
        ({"memory": {"layertype_0_sp": {"512": {"parameter_size": 1.0, "tp_activation_per_bsz_dict": {"2": 1.0}}}}}, "no table by degree"),
        ({"allreduce_bandwidth_1": {"allreduce_size_2_consec_1": 0}}, "allreduce_size_2_consec_1 is 0"),
        ({"allreduce_bandwidth_1": {"x": 1}}, "no allreduce_size_*_consec_1"),
        ({"overlap": {"overlap_coe": 0.5}}, "no overlap_coe of at least 1"),
        ({"galvatron": {"pp_deg": 1}}, "is no plan of Galvatron: KeyError"),
        ({"galvatron": {**FILES[[*FILES][-1]], "pp_division": "2"}}, "do not fit 3 layers"),
        ({"galvatron": {**FILES[[*FILES][-1]], "tp_sizes_enc": "1,3,1"}}, "degree 3 does not divide the 2 ranks"),
        (
            {"computation": None, "memory": None, "allreduce": None, "p2p": None, "sp_time": None, "galvatron": None},
            "neither a layer's times and memory (layertype_0_*) nor bandwidths",
        ),
        (dict.fromkeys(("computation", "memory", "allreduce", "p2p", "sp_time", "overlap", "galvatron")), "no JSON file of Galvatron's"),
    ],
)  # fmt: skip
def test_a_broken_folder_is_refused_in_one_sentence(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as refused:
        read_galvatron([write(tmp_path, **changes)])
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_command(tmp_path: Path) -> None:
    """It writes YAML and says what is not there; a missing folder is exit code 2."""
    made = run("profile", "import", "galvatron", str(write(tmp_path / "in")), "-o", str(tmp_path / "out.yaml"))
    assert made.returncode == 0, made.stderr
    assert "a layer profile of tiny, clusters 1x2, 2x2" in made.stdout
    assert "not there: the hidden size" in made.stdout
    assert yaml.safe_load((tmp_path / "out.yaml").read_text())["layers"] == 3
    refused = run("profile", "import", "galvatron", str(tmp_path / "nowhere"), "-o", str(tmp_path / "out.yaml"))
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "is not a folder" in refused.stderr


def test_other_yaml_is_no_layer_profile(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("format: something else\n")
    with pytest.raises(InputError, match="is no layer profile: format"):
        read_layer_profile(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("a: [\n")
    with pytest.raises(InputError, match="cannot be read as YAML"):
        read_layer_profile(tmp_path / "x.yaml")
