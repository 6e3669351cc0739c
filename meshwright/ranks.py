"""The ranks of this job: joining them, the devices that they run on, and one plan for all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from meshwright.codegen.apply import PlanMismatch
from meshwright.planner.plan import Plan
from meshwright.planner.solve import Infeasible
from meshwright.profiling.cluster import Cluster, parse_cluster
from meshwright.profiling.errors import InputError
from meshwright.profiling.measure_host import device_name

log = logging.getLogger("meshwright")


def join() -> int:
    """How many ranks there are. Under torchrun this joins the process group, if the script has not; a group that exists is used as it is."""
    if not dist.is_available():
        return 1
    if dist.is_initialized():
        return dist.get_world_size()
    world = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if world < 2:
        return 1
    cuda = torch.cuda.is_available()
    if cuda and not dist.is_nccl_available():
        raise InputError("this torch has no NCCL, which ranks on GPUs need: install a CUDA build of torch, or hide the GPUs to run on gloo")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if cuda else "gloo")
    return world


def discover(ranks: int) -> Cluster:
    """The devices that this job's ranks run on: GPUs by the name torch has for them, or CPUs; nodes by LOCAL_WORLD_SIZE."""
    per = int(os.environ.get("LOCAL_WORLD_SIZE", str(ranks))) if ranks > 1 else 1
    shape = f"{ranks}x" if per >= ranks or ranks % per else f"{ranks // per}x{per}x"
    if not torch.cuda.is_available():
        return parse_cluster(f"{shape}cpu")
    name = device_name(torch.device("cuda", torch.cuda.current_device()))
    try:
        return parse_cluster(f"{shape}{name}")
    except InputError:
        raise InputError(f"{name} is not a built-in device: name the cluster, as cluster='8xH100-SXM' or a YAML file with its figures") from None


def agreed(model: nn.Module, given: Plan | None, make: Callable[[], Plan | Infeasible]) -> Plan | Infeasible:
    """What rank 0 makes, on every rank, after all have shown the same model and the same `given` plan. What rank 0 raises, all raise."""
    tensors = [(n, tuple(p.shape), str(p.dtype)) for n, p in model.named_parameters()]
    shown = _gathered((_sha(json.dumps(tensors)), len(tensors), _sha(given.to_json() if given is not None else "")))
    for rank, (own, count, plan) in enumerate(shown):
        if own != shown[0][0]:
            what = f"{count} parameters there, {shown[0][1]} on rank 0" if count != shown[0][1] else "parameters of other names, shapes or types"
            refuse(f"rank {rank} has another model than rank 0: {what}")
        if plan != shown[0][2]:
            refuse(f"rank {rank} was given another plan than rank 0: give every rank the same")
    told: tuple[str | None, Any] = (None, None)
    if dist.get_rank() == 0:
        try:
            found = make()
            text = found.to_json() if isinstance(found, Plan) else found.model_dump_json(by_alias=True)
            told = (text, _sha(text))
        except Exception as e:  # the others wait for it
            told = (None, e if isinstance(e, InputError) else RuntimeError(f"rank 0 could not plan: {type(e).__name__}: {e}"))
    text, digest = from_first(told)
    if text is None:
        raise digest
    right = _gathered(_sha(text) == digest)
    if not all(right):
        refuse(f"the plan did not reach rank {right.index(False)} as rank 0 sent it")
    infeasible = json.loads(text).get("schema") == "meshwright.infeasible/1"
    return Infeasible.model_validate_json(text) if infeasible else Plan.from_json(text)


def refuse(text: str) -> NoReturn:
    """Raises PlanMismatch, printed on rank 0."""
    if dist.is_initialized() and dist.get_rank() == 0:
        log.error("%s", text)
    raise PlanMismatch(text)


def from_first(value: Any) -> Any:
    """Rank 0's value on every rank."""
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


def _gathered(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
