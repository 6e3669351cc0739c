"""Hugging Face safetensors go into any layout and come out again, bit for bit, with no rank holding the whole model."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

sys.path.insert(0, str(Path(__file__).parent))
from harness import run
from models import build, write_models

from meshwright.codegen.apply import apply, packed_parameters
from meshwright.codegen.runtime.experts import place_experts
from meshwright.codegen.runtime.hub import WeightsMismatch, load_safetensors, save_safetensors
from meshwright.codegen.runtime.mesh import Mesh
from meshwright.codegen.runtime.shards import boxes, local, named_tensors
from meshwright.codegen.runtime.weights import allocate, blank, gather_full, remake_buffers
from meshwright.planner.plan import Plan
from meshwright.planner.solve import plan
from meshwright.profiling.trace import trace

Arrays = dict[str, np.ndarray[Any, Any]]
SMALL = 20_000  # bytes of a file: several for each model
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_models(tmp_path_factory.mktemp("models"))


def _pretrained(source: str, folder: Path) -> Any:
    """A transformers model with weights of its own, and the folder that its own save_pretrained wrote."""
    model: Any = build(source)
    torch.manual_seed(7)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
    model.save_pretrained(folder)
    return model.eval()


def _plan(source: str, **layout: Any) -> Plan:
    ranks = layout.get("dp", 1) * layout.get("tp", 1) * layout.get("pp", 1)
    fixed = {"tp": 1, "pp": 1, "dp": 1, "zero": 0, **layout}
    made = plan(trace(source, seq=16, precision="fp32"), f"{ranks}xcpu", global_batch=16, seq=16, fix=fixed)
    assert isinstance(made, Plan), made
    return made


def _in_and_out(made: Plan, source: str, folder: Path, out: Path) -> Arrays:
    """On a rank: reads a folder into the plan's layout and writes it again; what was read, whole."""
    parallel = apply(made, build(source))
    tensors = named_tensors(parallel.stage)
    options: dict[str, Any] = {"model": parallel.parts[0].model, "packed": packed_parameters(made), "tied": made.model.tied}
    load_safetensors(folder, tensors, **options)
    found = {n: gather_full(t, options["packed"].get(n)).detach().numpy().copy() for n, t in tensors.items()}
    save_safetensors(out, tensors, **options, shard_bytes=SMALL)
    return found


def _inputs(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return torch.randn(2, 3, 16, 16, generator=generator)
    return torch.randint(0, 64, (2, 16), generator=generator)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama", {"tp": 2, "dp": 2, "zero": 3}),
        ("gpt2", {"pp": 2, "tp": 2}),
        ("mixtral", {"dp": 4, "zero": 3}),
        ("qwen3-moe", {"pp": 2, "dp": 2, "zero": 2}),
        ("vit", {"dp": 2, "zero": 3}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_hub_s_files_go_in_and_come_out(sources: dict[str, str], tmp_path: Path, name: str, layout: dict[str, Any]) -> None:
    """Every rank has the pretrained tensors, and what is written has the names and values that transformers writes, and loads as such."""
    model = _pretrained(sources[name], tmp_path / "in")
    made = _plan(sources[name], **layout)
    wanted = {n: t.numpy() for n, t in model.state_dict().items()}
    seen = set()
    for found in run(made.layout.devices, _in_and_out, made, sources[name], tmp_path / "in", tmp_path / "out"):
        assert not [n for n, value in found.items() if not np.array_equal(value, wanted[n])]
        seen |= set(found)
    assert seen | {n for names in made.model.tied if seen & set(names) for n in names} == set(wanted)

    files = sorted((tmp_path / "out").glob("*.safetensors"))
    written = [load_file(f) for f in files]
    assert len(files) > 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == {key: f.name for f, tensors in zip(files, written, strict=True) for key in tensors}
    biggest = max(sum(t.nbytes for t in tensors.values()) for tensors in written if len(tensors) > 1)
    assert biggest <= SMALL
    theirs = load_file(tmp_path / "in" / "model.safetensors")
    ours = {key: t for tensors in written for key, t in tensors.items()}
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    again = type(model).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(again(_inputs(model)).logits, model(_inputs(model)).logits)


def _even(p: nn.Parameter) -> Shard:
    """A dimension that two ranks share evenly, as FSDP wants it of all but the first."""
    return Shard(next((d for d, n in enumerate(local(p).shape) if n % 2 == 0), 0))


def _experts_in_and_out(source: str, folder: Path, out: Path, ep: int, etp: int) -> Arrays:
    """On a rank: as _in_and_out, with fused experts over ep and etp and FSDP over the ranks that share them."""
    model: Any = build(source)
    mesh = Mesh("cpu", shard=4, ep=ep, etp=etp, zero=3)
    packed = {}
    for path, module in model.named_modules():
        if path.endswith(".experts"):
            packed[f"{path}.gate_up_proj"] = (1, 2)
            place_experts(module, mesh, experts=module.num_experts, params={"gate_up_proj": "S1x2", "down_proj": "S2"})
            fully_shard(module, mesh=mesh.expert_state(), shard_placement_fn=_even)
    fully_shard(model, mesh=mesh.state())
    tensors = dict(model.named_parameters())
    load_safetensors(folder, tensors, model=model, packed=packed)
    found = {n: gather_full(t, packed.get(n)).detach().numpy().copy() for n, t in tensors.items()}
    save_safetensors(out, tensors, model=model, packed=packed)
    return found


@pytest.mark.parametrize(("name", "ep", "etp"), [("qwen3-moe", 2, 2), ("mixtral", 1, 2), ("mixtral", 2, 1)])
def test_experts_are_read_where_they_live(sources: dict[str, str], tmp_path: Path, name: str, ep: int, etp: int) -> None:
    """The hub's experts, kept apart, land in fused tensors over expert and expert-tensor ranks, and come out apart again."""
    model = _pretrained(sources[name], tmp_path / "in")
    wanted = {n: t.numpy() for n, t in model.state_dict().items()}
    for found in run(4, _experts_in_and_out, sources[name], tmp_path / "in", tmp_path / "out", ep, etp):
        assert set(found) == set(wanted)
        assert not [n for n, value in found.items() if not np.array_equal(value, wanted[n])]
    theirs, ours = (load_file(tmp_path / x / "model.safetensors") for x in ("in", "out"))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def _held(sizes: tuple[int, ...], pieces: int) -> list[Any]:
    """On a rank of a pair x pair: which places of a tensor it holds, by the boxes and by what sharding left there."""
    mesh = Mesh("cpu", shard=4, ep=1, etp=2, zero=3)
    whole = torch.arange(float(torch.tensor(sizes).prod())).view(sizes)
    module = nn.Module()
    module.register_parameter("w", nn.Parameter(whole.clone()))
    module.num_experts, module.forward = sizes[0], lambda h, i, w: h  # type: ignore[assignment]
    place_experts(module, mesh, experts=sizes[0], params={"w": f"S1x{pieces}"})
    fully_shard(module, mesh=mesh.expert_state(), shard_placement_fn=_even)
    by_boxes = torch.full_like(local(module.w), -1.0)
    for box in boxes(module.w, (1, pieces)):
        by_boxes[box.local] = whole[box.whole]
    return [by_boxes.tolist(), local(module.w).tolist()]


@pytest.mark.parametrize(("sizes", "pieces"), [((4, 12, 2), 2), ((4, 12, 2), 3), ((1, 12, 3), 3), ((3, 8, 1), 2)])
def test_boxes_are_what_sharding_leaves_on_a_rank(sizes: tuple[int, ...], pieces: int) -> None:
    """Packed over one group and cut again by FSDP, on the same dimension or another, each place is where the boxes say; together they are all."""
    places: set[float] = set()
    for by_boxes, by_sharding in run(4, _held, sizes, pieces):
        assert by_boxes == by_sharding
        places |= set(np.array(by_sharding).flatten().tolist())
    assert places == set(range(int(np.prod(sizes))))


def test_a_file_of_the_base_model_and_another_type(sources: dict[str, str], tmp_path: Path) -> None:
    """Names without the first word, as GPT-2's on the hub, are found, and bf16 becomes the model's own type."""
    model, other = _pretrained(sources["gpt2"], tmp_path / "in"), build(sources["gpt2"])
    held = load_file(tmp_path / "in" / "model.safetensors")
    save_file({n.removeprefix("transformer."): t.bfloat16() for n, t in held.items()}, tmp_path / "base.safetensors")
    load_safetensors(tmp_path / "base.safetensors", dict(other.named_parameters()), model=other)
    wanted = {n: t.bfloat16().float() for n, t in model.named_parameters()}
    assert all(torch.equal(t, wanted[n]) for n, t in other.named_parameters())


def test_fused_experts_are_read_as_they_are(sources: dict[str, str], tmp_path: Path) -> None:
    """A file may keep experts as the model does."""
    model, other = _pretrained(sources["mixtral"], tmp_path / "in"), build(sources["mixtral"])
    save_file({n: t.clone() for n, t in model.state_dict().items()}, tmp_path / "fused.safetensors")
    load_safetensors(tmp_path / "fused.safetensors", dict(other.named_parameters()), model=other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_model_on_meta_is_filled_without_its_code_s_weights(sources: dict[str, str], tmp_path: Path) -> None:
    """Parameters come from the file and the buffers that no file holds from the model's code: the logits are the pretrained model's."""
    model = _pretrained(sources["llama"], tmp_path / "in")
    with torch.device("meta"):
        other: Any = type(model)(model.config).eval()
    template, device = blank(other), torch.device("cpu")
    allocate(other, device)
    load_safetensors(tmp_path / "in", dict(other.named_parameters()), model=other)
    remake_buffers(other, template, template._init_weights, device)
    assert torch.equal(other(_inputs(model)).logits, model(_inputs(model)).logits)


def _without(folder: Path, key: str) -> Path:
    """The weights of a folder but for one tensor."""
    held = load_file(folder / "model.safetensors")
    del held[key]
    save_file(held, folder.parent / "less.safetensors")
    return folder.parent / "less.safetensors"


@pytest.mark.parametrize(
    ("name", "key", "words"),
    [
        ("llama", "model.norm.weight", "less.safetensors has no tensor model.norm.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w3.weight", "less.safetensors has no tensor model.layers.1.mlp.experts.gate_up_proj"),
    ],
    ids=["plain", "expert"],
)
def test_a_missing_tensor_is_named(sources: dict[str, str], tmp_path: Path, name: str, key: str, words: str) -> None:
    """One sentence says which tensor of the model the file lacks, and nothing was read."""
    model, other = _pretrained(sources[name], tmp_path / "in"), build(sources[name])
    before = {n: p.clone() for n, p in other.named_parameters()}
    with pytest.raises(WeightsMismatch, match=words):
        load_safetensors(_without(tmp_path / "in", key), dict(other.named_parameters()), model=model)
    assert all(torch.equal(p, before[n]) for n, p in other.named_parameters())


def test_a_file_that_the_index_names_and_nobody_has(sources: dict[str, str], tmp_path: Path) -> None:
    """A download that is not whole is one sentence too."""
    model = build(sources["llama"])
    save_safetensors(tmp_path / "out", dict(model.named_parameters()), model=model, shard_bytes=SMALL)
    gone = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(WeightsMismatch, match=f"out cannot be read: .*{gone.name}"):
        load_safetensors(tmp_path / "out", dict(model.named_parameters()), model=model)
    gone.write_bytes(b"half")
    with pytest.raises(WeightsMismatch, match="out cannot be read: "):
        load_safetensors(tmp_path / "out", dict(model.named_parameters()), model=model)


def test_quantised_files_are_refused(tmp_path: Path) -> None:
    """fp8 weights mean nothing without their scales: they are not read as if they did."""
    net = nn.Linear(4, 4)
    save_file({"weight": net.weight.detach().to(torch.float8_e4m3fn), "bias": net.bias.detach()}, tmp_path / "small.safetensors")
    with pytest.raises(WeightsMismatch, match="weight is F8_E4M3 in .*small.safetensors: quantised weights must be converted"):
        load_safetensors(tmp_path / "small.safetensors", dict(net.named_parameters()))


def test_other_shapes_no_files_and_an_existing_folder_are_refused(tmp_path: Path) -> None:
    """Each is one sentence."""
    net = nn.Linear(4, 4)
    save_safetensors(tmp_path / "out", dict(net.named_parameters()))
    with pytest.raises(WeightsMismatch, match=r"weight is \[4, 4\] in .*/out and \[5, 4\] in the model"):
        load_safetensors(tmp_path / "out", dict(nn.Linear(4, 5).named_parameters()))
    with pytest.raises(WeightsMismatch, match="holds no safetensors file"):
        load_safetensors(tmp_path, dict(net.named_parameters()))
    with pytest.raises(WeightsMismatch, match="exists: name a new folder"):
        save_safetensors(tmp_path / "out", dict(net.named_parameters()))
