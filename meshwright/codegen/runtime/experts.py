"""Expert parallelism: each rank holds some of a layer's experts, and tokens travel to the ranks of their experts and back.

Experts are laid over all ranks of a stage, etp x ep x copies, etp innermost (mesh.py). At the experts' boundary, forward(hidden [T, H],
index [T, k], weights [T, k]) -> [T, H], every rank has tokens of its own; what runs on the rows that a rank receives is the module's own
forward, with one expert a row and a weight of one, so that its activation, biases and kernels stay the model's.

`params` gives the state of each parameter over etp ("S1x2", "S2", "I", or "P": added by one rank), as in tensor_parallel.py; over ep fused
parameters [E, ...] are sharded on dimension 0.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_common
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from .mesh import Mesh
from .tensor_parallel import _owner, convert, pack

_fsdp: Any = _fsdp_common if hasattr(_fsdp_common, "ShardPlacementResult") else None
_balanced = False


@contextlib.contextmanager
def balanced_routing() -> Iterator[None]:
    """Every rank is sent equally many tokens, whatever the router says: shapes that fake tensors have too. The numbers are not the model's."""
    global _balanced
    before, _balanced = _balanced, True
    try:
        yield
    finally:
        _balanced = before


def place_experts(
    module: nn.Module, mesh: Mesh, *, experts: int, params: Mapping[str, str], sizes: Mapping[str, int] | None = None, listed: str | None = None
) -> None:  # fmt: skip
    """Keeps this rank's part of `experts` experts and makes `module` send tokens to the ranks that hold the others.

    Every rank holds the whole module with equal weights, or on meta. Fused experts: `params` are names in the module, of tensors
    [E, ...]. `listed`: the path of a ModuleList of equal experts instead, and `params` are names in one of them; a rank keeps its own
    experts under their own names. `sizes`: attributes of the module to set to their local value.
    """
    ep, etp = mesh["ep"].size(), mesh["etp"].size()
    own = range(experts // ep * mesh["ep"].get_local_rank(), experts // ep * (mesh["ep"].get_local_rank() + 1))
    if listed is not None:
        parent, _, name = listed.rpartition(".")
        setattr(module.get_submodule(parent), name, _Owned(module.get_submodule(listed), own))
        params = {f"{listed}.{i}.{name}": state for i in own for name, state in params.items()}
    for path, state in params.items():
        owner, name = _owner(module, path)
        p = owner._parameters[name]
        if p is not None and (listed is None or etp > 1):
            owner.register_parameter(name, _placed(p, state, mesh, None if listed else own))
    for name, size in (sizes or {}).items():
        setattr(module, name, size)
    run = functools.partial(_run, module, module.forward, dict(params), mesh, len(own), listed)
    signature = inspect.signature(module.forward)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        hidden, index, weights = signature.bind(*args, **kwargs).args
        return run(hidden, index, weights) if ep * etp == 1 and not (_balanced and listed) else dispatch(hidden, index, weights, run, mesh, experts)

    module.forward = forward  # type: ignore[method-assign]


def fully_shard_layer(layer: nn.Module, experts: Sequence[nn.Module], mesh: Mesh, **options: Any) -> None:
    """fully_shard for a layer: placed experts in it over mesh.expert_state(), everything else over mesh.state().

    Both belong to one unit of FSDP, so that nothing is gathered inside the layer's forward, where selective recompute would see it. Before
    torch had a mesh for each parameter, experts are a unit of their own, and selective recompute around them fails.
    """
    own = {p for m in experts for p in m.parameters()}
    state = mesh.expert_state()

    def dimension(p: nn.Parameter) -> Shard | None:
        """Another one than the first where a rank's experts are not divisible by the ranks that share them."""
        cut = {x.dim for x in p.placements if isinstance(x, Shard)} if isinstance(p, DTensor) else set()
        shape = p.to_local().shape if isinstance(p, DTensor) else p.shape
        dims = [0, *sorted(range(1, len(shape)), key=lambda d: d in cut)]
        return next((Shard(d) for d in dims if shape[d] % state.size(-1) == 0), None)

    if not own:
        fully_shard(layer, mesh=mesh.state(), **options)
    elif _fsdp is not None:
        info = _fsdp.FSDPMeshInfo(state, shard_mesh_dim=0) if state.ndim == 1 else _fsdp.HSDPMeshInfo(state, shard_mesh_dim=1, replicate_mesh_dim=0)

        def placement(p: nn.Parameter) -> Any:
            return _fsdp.ShardPlacementResult(dimension(p), info) if p in own else None

        fully_shard(layer, mesh=mesh.state(), shard_placement_fn=placement, **options)
    else:
        policy = options.get("mp_policy", MixedPrecisionPolicy())
        alone = {**options, "mp_policy": dataclasses.replace(policy, cast_forward_inputs=False)}  # the router's weights stay as they are
        for m in experts:
            fully_shard(m, mesh=state, shard_placement_fn=dimension, **alone)
        fully_shard(layer, mesh=mesh.state(), **options)


class _Owned(nn.ModuleList):
    """Some experts of a list, under their own names, indexed from zero."""

    def __init__(self, experts: nn.Module, own: range) -> None:
        super().__init__()
        for i in own:
            self.add_module(str(i), experts.get_submodule(str(i)))

    def __getitem__(self, i: Any) -> Any:
        return list(self._modules.values())[i]


def _placed(p: nn.Parameter, state: str, mesh: Mesh, own: range | None) -> nn.Parameter:
    """A parameter as a DTensor over etp, and over ep too where its dimension 0 counts experts of which this rank has `own`."""
    dim, _, pieces = state[1:].partition("x")
    local, etp = p.data if own is None else p.data[own.start : own.stop], mesh["etp"]
    if state[0] == "S":
        local = pack(local, int(dim), int(pieces or 1), etp.size()).chunk(etp.size(), int(dim))[etp.get_local_rank()]
    placements: list[Placement] = [Shard(int(dim)) if state[0] == "S" else Replicate()]
    over, placements = (etp, placements) if own is None else (mesh["ep", "etp"], [Shard(0), *placements])
    return nn.Parameter(DTensor.from_local(local.clone(), over, placements, run_check=False), requires_grad=p.requires_grad)


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.factor, None


def _run(
    module: nn.Module, forward: Callable[..., Tensor], params: dict[str, str], mesh: Mesh, experts: int, listed: str | None,
    rows: Tensor, index: Tensor, weights: Tensor,
) -> Tensor:  # fmt: skip
    """The module's own forward on this rank's `experts` experts. rows [n, H], index and weights [n, k] -> [n, H]

    A gradient is here the sum over the ranks whose tokens come to this one. FSDP averages over the copies of an expert; what is wanted
    is the sum over all ranks of a stage over the data- and context-parallel ranks, each of which has a loss of its own.
    """
    of = mesh.degrees
    factor = of["tp"] / (of["ep"] * of["etp"])
    stored: list[Any] = []
    try:
        for path, state in params.items():
            owner, name = _owner(module, path)
            p = owner._parameters[name]
            if p is None:
                continue
            stored.append((owner, name, p))
            local = p.to_local() if isinstance(p, DTensor) else p
            local = local if factor == 1 else _Scale.apply(local, factor)
            owner._parameters[name] = convert(local, "I>P", mesh["etp"]) if state == "P" and of["etp"] > 1 else local  # type: ignore[assignment]
        if listed is None:
            return forward(rows, index, weights)
        held = list(module.get_submodule(listed).children())
        if _balanced:
            return torch.cat([e(part) for e, part in zip(held, rows.tensor_split(experts), strict=True)])
        # every rank needs a gradient of every expert, or FSDP waits for those that have none
        idle = set(range(experts)) - set(index.unique().tolist())
        return forward(rows, index, weights) + sum(held[i](rows[:0]).sum() for i in sorted(idle))
    finally:
        for owner, name, p in stored:
            owner._parameters[name] = p


class _Exchange(torch.autograd.Function):
    """all_to_all of rows: sent[r] of them go to rank r and received[r] come from it. Gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.back = (received, sent, group)
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _all_to_all(grad, *ctx.back), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    return funcol.wait_tensor(funcol.all_to_all_single(rows.contiguous(), received, sent, group))


class _Routes(NamedTuple):
    """Where rows go. `order` sorts the T x k copies of tokens by expert, `back` undoes it; `sent`, `received`: rows to and from each rank
    of ep; `shared`: rows that each rank of etp received; `ids`: the local expert of each row that is computed here."""

    order: Tensor
    back: Tensor
    sent: list[int]
    received: list[int]
    shared: list[int]
    ids: Tensor


def dispatch(
    hidden: Tensor, index: Tensor, weights: Tensor, run: Callable[[Tensor, Tensor, Tensor], Tensor], mesh: Mesh, experts: int
) -> Tensor:  # fmt: skip
    """Runs every token on its experts, wherever they are, and adds the results by weight. hidden [T, H], index and weights [T, k] -> [T, H]

    `run(rows [n, H], ids [n, 1], ones [n, 1])` computes this rank's experts. Rows go to a rank of ep, then to every rank of etp there,
    which has a part of the expert; what comes back are partial sums.
    """
    ep, etp = mesh["ep"], mesh["etp"]
    routes = (_balanced_routes if _balanced else _routes)(index, mesh, experts)
    order, back, sent, received, shared, ids = routes
    rows = hidden[order // index.shape[-1]]
    mine, parts = sum(received), etp.size()
    if ep.size() > 1:
        rows = _Exchange.apply(rows, sent, received, ep.get_group())
    if parts > 1:
        rows = _Exchange.apply(rows.repeat(parts, 1), [mine] * parts, shared, etp.get_group())
    n = rows.shape[0]
    if n == 0:  # a row of zeros, so that every parameter has a gradient on every rank
        rows, ids = torch.cat([rows, rows.new_zeros(1, rows.shape[1])]), ids.new_zeros(1)
    out = run(rows, ids.unsqueeze(1), weights.new_ones(len(ids), 1))[:n]
    if parts > 1:
        out = _Exchange.apply(out, shared, [mine] * parts, etp.get_group()).view(parts, mine, rows.shape[-1]).sum(0)
    if ep.size() > 1:
        out = _Exchange.apply(out, received, sent, ep.get_group())
    out = out[back].view(*index.shape, -1) * weights.unsqueeze(-1)
    return out.sum(1).to(hidden.dtype)


def _routes(index: Tensor, mesh: Mesh, experts: int) -> _Routes:
    """Routes of the router's choice [T, k]. Ranks tell each other how many rows they send: the only wait for the device."""
    ep, etp = mesh["ep"], mesh["etp"]
    local = experts // ep.size()
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    counts = torch.zeros(experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    come = _all_to_all(counts, [local] * ep.size(), [local] * ep.size(), ep.get_group()) if ep.size() > 1 else counts
    everywhere = _told(come, etp).view(etp.size(), -1)  # [etp, ep x local experts]
    n = ep.size()
    by_rank = torch.cat([counts.view(n, -1).sum(1), come.view(n, -1).sum(1), everywhere.sum(1)]).tolist()
    sent, received, shared = by_rank[:n], by_rank[n : 2 * n], by_rank[2 * n :]
    each = torch.arange(local, device=flat.device).repeat(etp.size() * n)
    return _Routes(order, back, sent, received, shared, each.repeat_interleave(everywhere.flatten(), output_size=sum(shared)))


def _told(counts: Tensor, etp: Any) -> Tensor:
    """The counts of every rank of etp, one after another."""
    n = etp.size()
    return _all_to_all(counts.repeat(n), [len(counts)] * n, [len(counts)] * n, etp.get_group()) if n > 1 else counts


def _balanced_routes(index: Tensor, mesh: Mesh, experts: int) -> _Routes:
    """Routes with as many rows for every rank, rounded up, and for every expert of a rank but for one."""
    ep, etp = mesh["ep"].size(), mesh["etp"].size()
    copies = index.numel()
    each = -(-copies // ep)
    order = torch.arange(each * ep, device=index.device) % copies
    ids = torch.arange(each * ep * etp, device=index.device) % (experts // ep)
    return _Routes(order, torch.arange(copies, device=index.device), [each] * ep, [each] * ep, [each * ep] * etp, ids)
