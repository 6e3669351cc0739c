"""LayerProfile from the JSON files that Hetu-Galvatron's profilers write, and the plan that its search wrote beside them.

Files of a folder (github.com/PKU-DAIR/Hetu-Galvatron: models/*/configs and profile_hardware/hardware_configs), times in ms, MB of
2**20 bytes, bandwidths in GB/s:

    computation_profiling_<precision>_<model>_all.json   layertype_0_bsz<b>_seq<s>, layertype_other_bsz<b>_seq<s>: ms a sample
    memory_profiling_<precision>_<model>_all.json        layertype_0_sp, other_memory_pp_off_sp, other_memory_pp_on_first_sp, .._last_sp
    allreduce_bandwidth_<n>nodes_<g>gpus_per_node.json   allreduce_size_<ranks>_consec_<1 or 0>
    p2p_bandwidth_<n>nodes_<g>gpus_per_node.json         pp_size_<stages>
    sp_time_<n>nodes_<g>gpus_per_node.json               allreduce_size_<ranks>_<MB>MB_time, all2all_size_<ranks>_<MB>MB_time
    overlap_coefficient.json                             overlap_coe
    galvatron_config_<model>_<n>nodes_.._<limit>GB_..json  the plan

Runs of whole models (`layernum[2]_bsz1_seq2048`) are what those tables were made from: a file with these alone has no layer's time in
it, and is passed over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meshwright.profiling.errors import InputError
from meshwright.profiling.layerprofile import EndSamples, LayerPlan, LayerProfile, LayerSamples, Links, Strategy, VocabSamples

# layers and hidden size, which no profile says; each model's published config.json
SIZES = {
    "gpt2-small": (12, 768), "gpt2-xl": (48, 1600), "llama-7b": (32, 4096), "llama2-7b": (32, 4096), "llama2-13b": (40, 5120),
    "llama2-70b": (80, 8192), "llama3-8b": (32, 4096), "llama3-70b": (80, 8192), "mistral-7b": (32, 4096), "qwen2.5-7b": (28, 3584),
    "qwen2.5-32b": (64, 5120),
}  # fmt: skip
KINDS = ("computation_profiling", "memory_profiling", "allreduce_bandwidth", "p2p_bandwidth", "sp_time", "overlap", "galvatron_config")
Json = dict[str, Any]


def read_galvatron(folders: Sequence[Path]) -> LayerProfile:
    """The profile in one or more folders: the model's and the cluster's may lie apart. InputError says which file is broken, or that
    there is nothing to read."""
    files: dict[str, list[Path]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder: profile import galvatron takes the folders of its JSON files")
        for path in sorted(folder.glob("*.json")):
            for kind in KINDS:
                if path.name.startswith(kind):
                    files.setdefault(kind, []).append(path)
    if not files:
        raise InputError(f"{', '.join(map(str, folders))}: no JSON file of Galvatron's profilers, such as computation_profiling_*.json")
    times = _fullest(files.get("computation_profiling", []), "layertype_0_")
    memory = _fullest(files.get("memory_profiling", []), "layertype_0_sp")
    used = {x[0] for x in (times, memory) if x}
    passed = [p.name for k in ("computation_profiling", "memory_profiling") for p in files.get(k, []) if p not in used]
    model, precision, sequence = "", "", 0
    layer = vocab = None
    if times and memory:
        if (named := _named(times[0])) != _named(memory[0]):
            raise InputError(f"{times[0].name} and {memory[0].name} are of different models")
        precision, model = named
        sequence = _sequence(*times)
        layer, vocab = _layer(times, memory, sequence), _vocab(times, memory, sequence)
    elif any(files.get(k) for k in ("computation_profiling", "memory_profiling")):
        precision, model = _named((files.get("computation_profiling") or files["memory_profiling"])[0])
    plan, limit = _plan(files.get("galvatron_config", []), model)
    layers, hidden = SIZES.get(model, (None, None))
    if plan is not None:
        if layers is not None and len(plan.layers) != layers:
            raise InputError(f"the chosen plan is of {len(plan.layers)} layers, and {model} has {layers}")
        layers = len(plan.layers)
    made = LayerProfile(
        model=model, precision=precision, sequence=sequence, layers=layers, hidden=hidden, layer=layer, vocab=vocab, clusters=_clusters(files),
        overlap=_overlap(files.get("overlap", [])), plan=plan, plan_limit_MB=limit,
        provenance={"kind": "imported", "source": "profiles of Hetu-Galvatron", "not_used": passed},
    )  # fmt: skip
    if layer is None and not made.clusters:
        raise InputError(f"{', '.join(map(str, folders))}: neither a layer's times and memory (layertype_0_*) nor bandwidths are there")
    return made


def _load(path: Path) -> Json:
    try:
        found = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path} cannot be read: {e}") from None
    except json.JSONDecodeError as e:
        raise InputError(f"{path} is not JSON: {e.msg} at line {e.lineno}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds {type(found).__name__}, not an object of named figures")
    return found


def _number(value: Any, path: Path, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise InputError(f"{path}: {key} is {value!r}, not a figure of 0 or more")
    return float(value)


def _fullest(paths: list[Path], prefix: str) -> tuple[Path, Json] | None:
    """The one file with rows of that name; None if there is none."""
    found = [(p, rows) for p in paths for rows in [_load(p)] if any(k.startswith(prefix) for k in rows)]
    if len(found) > 1:
        raise InputError(f"{' and '.join(p.name for p, _ in found)} both hold {prefix}*: give folders with one model")
    return found[0] if found else None


def _named(path: Path) -> tuple[str, str]:
    """Precision and model that a file's name says."""
    match = re.fullmatch(r"(?:computation|memory)_profiling_([^_]+)_(.+?)(?:_seqlen\d+)?(?:_all)?\.json", path.name)
    if not match:
        raise InputError(f"{path.name} is not named like computation_profiling_bf16_llama2-7b_all.json")
    return match[1], match[2]


def _sequence(path: Path, rows: Json) -> int:
    found = {int(m[1]) for k in rows if (m := re.fullmatch(r"layertype_0_bsz\d+_seq(\d+)", k))}
    if len(found) != 1:
        raise InputError(f"{path.name} has layers of {len(found)} sequence lengths {sorted(found)}, and a layer profile is of one")
    return found.pop()


def _seconds(times: tuple[Path, Json], name: str, sequence: int) -> dict[int, float]:
    """Samples -> seconds. The file gives ms a sample."""
    path, rows = times
    out = {}
    for key, value in rows.items():
        if match := re.fullmatch(rf"layertype_{name}_bsz(\d+)_seq{sequence}", key):
            samples = int(match[1])
            out[samples] = samples * _number(value, path, key) / 1e3
    if not out:
        raise InputError(f"{path} has no layertype_{name}_bsz*_seq{sequence}")
    return dict(sorted(out.items()))


def _table(memory: tuple[Path, Json], section: str, sequence: int, *names: str) -> list[dict[str, Any]]:
    path, rows = memory
    part = rows.get(section, {})
    part = part.get(str(sequence)) if isinstance(part, dict) else None
    if not isinstance(part, dict) or any(n not in part for n in names):
        raise InputError(f"{path} has no {section} of sequence {sequence} with {' and '.join(names)}")
    return [part[n] for n in names]


def _degrees(table: Any, path: Path, name: str) -> dict[int, float]:
    if not isinstance(table, dict) or "1" not in table:
        raise InputError(f"{path}: {name} is no table by degree that starts at 1")
    return {int(k): _number(v, path, f"{name} of {k}") for k, v in table.items() if str(k).isdigit()}


def _layer(times: tuple[Path, Json], memory: tuple[Path, Json], sequence: int) -> LayerSamples:
    parameters, activation = _table(memory, "layertype_0_sp", sequence, "parameter_size", "tp_activation_per_bsz_dict")
    by_degree = _degrees(activation, memory[0], "tp_activation_per_bsz_dict")
    return LayerSamples(
        forward_s=_seconds(times, "0", sequence),
        parameters_MB=_number(parameters, memory[0], "parameter_size"),
        activation_MB=by_degree,
        checkpoint_MB=_number(activation.get("checkpoint"), memory[0], "the activation of a checkpointed layer"),
    )


def _vocab(times: tuple[Path, Json], memory: tuple[Path, Json], sequence: int) -> VocabSamples:
    def end(section: str) -> EndSamples:
        states, activation = _table(memory, section, sequence, "model_states", "activation")
        return EndSamples(
            states_MB=_degrees(states, memory[0], f"{section} model_states"), activation_MB=_degrees(activation, memory[0], f"{section} activation")
        )

    return VocabSamples(
        forward_s=_seconds(times, "other", sequence),
        both=end("other_memory_pp_off_sp"),
        first=end("other_memory_pp_on_first_sp"),
        last=end("other_memory_pp_on_last_sp"),
    )


def _clusters(files: dict[str, list[Path]]) -> list[Links]:
    """One entry for each size that all-reduces were measured on."""

    def sized(kind: str) -> dict[tuple[int, int], tuple[Path, Json]]:
        out = {}
        for path in files.get(kind, []):
            if match := re.fullmatch(rf"{kind}_(\d+)nodes_(\d+)gpus_per_node\.json", path.name):
                out[int(match[1]), int(match[2])] = path, _load(path)
        return out

    hops, tables = sized("p2p_bandwidth"), sized("sp_time")
    out = []
    for (nodes, devices), (path, rows) in sorted(sized("allreduce_bandwidth").items()):
        groups: list[dict[int, float]] = [{}, {}]
        for key, value in rows.items():
            if match := re.fullmatch(r"allreduce_size_(\d+)_consec_([01])", key):
                groups[int(match[2])][int(match[1])] = _positive(value, path, key)
        if not groups[1]:
            raise InputError(f"{path} has no allreduce_size_*_consec_1")
        p2p = {}
        if (nodes, devices) in hops:
            where, stages = hops[nodes, devices]
            p2p = {int(k.removeprefix("pp_size_")): _positive(v, where, k) for k, v in stages.items() if re.fullmatch(r"pp_size_\d+", k)}
        timed: dict[str, dict[int, dict[int, float]]] = {"allreduce": {}, "all2all": {}}
        if (nodes, devices) in tables:
            where, times = tables[nodes, devices]
            for key, value in times.items():
                if match := re.fullmatch(r"(allreduce|all2all)_size_(\d+)_(\d+)MB_time", key):
                    timed[match[1]].setdefault(int(match[2]), {})[int(match[3])] = _number(value, where, key) / 1e3
        out.append(
            Links(
                nodes=nodes, devices_per_node=devices, consecutive_GBps=groups[1], strided_GBps=groups[0], p2p_GBps=p2p,
                allreduce_s=timed["allreduce"], all_to_all_s=timed["all2all"],
            )
        )  # fmt: skip
    return out


def _positive(value: Any, path: Path, key: str) -> float:
    if not (found := _number(value, path, key)):
        raise InputError(f"{path}: {key} is 0, and a bandwidth is more")
    return found


def _overlap(paths: list[Path]) -> float | None:
    for path in paths:
        rows = _load(path)
        if "overlap_coe" not in rows or _number(rows["overlap_coe"], path, "overlap_coe") < 1:
            raise InputError(f"{path} has no overlap_coe of at least 1")
        return float(rows["overlap_coe"])
    return None


def _plan(paths: list[Path], model: str) -> tuple[LayerPlan | None, float | None]:
    """The plan that its search wrote, and the MB of a rank that the file's name says."""
    if len(paths) > 1:
        raise InputError(f"{' and '.join(p.name for p in paths)}: give a folder with one chosen plan")
    if not paths:
        return None, None
    path, rows = paths[0], _load(paths[0])
    try:
        numbers = {k: [int(i) for i in str(rows[k]).split(",")] for k in ("tp_sizes_enc", "dp_types_enc", "checkpoint", "pp_division")}
        ulysses = [int(i) for i in str(rows.get("use_sp", "0")).split(",")]
        stages, batch, microbatches = int(rows["pp_deg"]), int(rows["global_bsz"]), int(rows["chunks"])
        world, plain = int(rows["world_size"]), {"zero2": 2, "ddp": 0}[rows["default_dp_type"]]
        end, end_ulysses, end_sharded = int(rows["vtp"]), int(rows.get("vsp", 0)), int(rows["embed_sdp"])
    except (KeyError, ValueError, TypeError) as e:
        raise InputError(f"{path} is no plan of Galvatron: {type(e).__name__} {e}") from None
    layers = len(numbers["tp_sizes_enc"])
    ulysses = ulysses * layers if len(ulysses) == 1 else ulysses
    same = {len(x) for x in (numbers["dp_types_enc"], numbers["checkpoint"], ulysses)} == {layers}
    cut = tuple(numbers["pp_division"])
    if not same or len(cut) != stages or sum(cut) != layers or stages < 1 or world % stages or min(numbers["tp_sizes_enc"] + [end, microbatches]) < 1:
        raise InputError(f"{path}: its lists do not fit {layers} layers, {stages} stages and {world} devices")
    ranks = world // stages

    def strategy(degree: int, ulysses: int, sharded: int, checkpoint: int) -> Strategy:
        if ranks % degree:
            raise InputError(f"{path}: degree {degree} does not divide the {ranks} ranks of a stage")
        data = ranks // degree
        return Strategy(degree, data, bool(ulysses) and degree > 1, 3 if sharded else plain if data > 1 else 0, bool(checkpoint))

    limit = re.search(r"_(\d+)GB", path.name)
    return (
        LayerPlan(
            cut, microbatches, batch,
            tuple(map(strategy, numbers["tp_sizes_enc"], ulysses, numbers["dp_types_enc"], numbers["checkpoint"])),
            strategy(end, end_ulysses, end_sharded, 0),
        ),
        1024.0 * int(limit[1]) if limit else None,
    )  # fmt: skip
