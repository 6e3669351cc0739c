"""The two programs of a module: its forward graph (torch.export) and its joint forward and backward graph, linked.

Batch dependence is read off a trace at a prime batch size: a size that the prime divides grows with the batch, any other
does not (no model has a dimension that is a multiple of a large prime; the tracer picks another where one has).
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from meshwright.profiling.graph import Amount, TensorSpec
from meshwright.profiling.kinds import op_name

_ASSERTIONS = ("_assert_tensor_metadata", "_assert_scalar", "sym_size", "sym_constrain_range")
PRIMES = (1009, 1013, 1019, 1021, 1031)


@dataclass
class Kernel:
    """One launch of the joint graph, attributed to the forward op `op`."""

    op: str
    backward: bool
    flops: Amount
    bytes: Amount


@dataclass
class Allocation:
    """One storage of the joint graph: kernels index when it appears and is last used. `result`: the graph returns it (a gradient)."""

    op: str
    amount: Amount
    born: int
    dies: int
    born_backward: bool
    dies_backward: bool
    result: bool = False


@dataclass
class Joint:
    """What the joint graph says, per forward op (a node of the exported graph)."""

    exported: Any
    kernels: list[Kernel] = field(default_factory=list)
    allocations: list[Allocation] = field(default_factory=list)


class Batch:
    """The prime that stands for the batch while tracing."""

    def __init__(self, prime: int) -> None:
        self.prime = prime

    def amount(self, n: float) -> Amount:
        n = int(n)
        return Amount(per_sample=n // self.prime) if n % self.prime == 0 else Amount(const=n)

    def spec(self, t: Tensor) -> TensorSpec:
        shape, batch_dim = [], None
        for i, size in enumerate(t.shape):
            size = int(size)
            if size and size % self.prime == 0 and batch_dim is None:
                batch_dim, size = i, size // self.prime
            shape.append(size)
        return TensorSpec(shape=tuple(shape), dtype=str(t.dtype).removeprefix("torch."), batch_dim=batch_dim)

    def arg(self, value: Any) -> Any:
        """A non-tensor argument as JSON: integers that the batch multiplies become "B*<n>"."""
        if isinstance(value, bool) or value is None or isinstance(value, str | float):
            return value
        if isinstance(value, int):
            return f"B*{value // self.prime}" if value and value % self.prime == 0 else value
        if isinstance(value, list | tuple):
            return [self.arg(v) for v in value]
        return str(value)


def export(module: nn.Module, kwargs: dict[str, Any]) -> Any:
    """torch.export of `module` on meta, keeping which values enter and leave every submodule."""
    names = tuple(name for name, _ in module.named_modules(remove_duplicate=True) if name)
    return torch.export.export(module, (), kwargs, strict=False, preserve_module_call_signature=names)


def trace_joint(exported: Any, kwargs: dict[str, Any], batch: Batch) -> Joint:
    """Joint forward and backward graph of an exported module that returns a scalar loss, attributed to its ops."""
    from torch._functorch.aot_autograd import aot_export_joint_with_descriptors

    module = exported.module()
    renamed = _as_opaque_ops(module)
    with contextlib.ExitStack() as stack:
        joint = aot_export_joint_with_descriptors(stack, module, (), kwargs, _record_nn_module_stack=True)
        graph: Graph = joint._aot_graph_capture.graph_module.graph
    return _attribute(graph, exported, renamed, batch)


def _as_opaque_ops(module: GraphModule) -> dict[str, str]:
    """Replaces attention and the negative log-likelihood by our own ops; returns {new node name: exported node name}."""
    from meshwright.profiling import ops  # noqa: F401

    aten, ours = torch.ops.aten, torch.ops.meshwright
    renamed = {}
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        args = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | dict(node.kwargs)
        made: list[Node] = []
        with graph.inserting_before(node):
            if node.target is aten.scaled_dot_product_attention.default:
                operands = (args["query"], args["key"], args["value"], args.get("attn_mask"))
                op = graph.call_function(ours.attention.default, (*operands, args.get("is_causal", False), args.get("dropout_p", 0.0)))
                made = [op, graph.call_function(operator.getitem, (op, 0))]
            elif node.target is aten.cross_entropy_loss.default and not _weighted(args):
                log_probs = graph.call_function(aten.log_softmax.int, (args["self"], 1))
                made = [log_probs, graph.call_function(ours.nll.default, (log_probs, args["target"]))]
            elif node.target in (aten.nll_loss.default, aten.nll_loss_nd.default) and not _weighted(args):
                made = [graph.call_function(ours.nll.default, (args["self"], args["target"]))]
        if not made:
            continue
        for n in made:
            n.meta.update({key: value for key, value in node.meta.items() if key != "val"})
            renamed[n.name] = node.name
        node.replace_all_uses_with(made[-1])
        graph.erase_node(node)
    module.recompile()
    return renamed


def _weighted(args: dict[str, Any]) -> bool:
    """A cross-entropy that is not the plain mean over class indices."""
    target = args["target"].meta["val"]
    return args.get("weight") is not None or args.get("label_smoothing", 0.0) != 0.0 or args.get("reduction", 1) != 1 or target.is_floating_point()


def skipped(node: Node) -> bool:
    """True for what is no op of the forward graph: inputs, elements of tuples, assertions, and what changes nothing."""
    if node.op != "call_function" or node.target is operator.getitem or op_name(node.target) in _ASSERTIONS:
        return True
    return is_identity(node)


def is_identity(node: Node) -> bool:
    """True for aliases and for conversions to the dtype that a tensor has."""
    name = op_name(node.target)
    if name in ("alias", "detach", "lift_fresh_copy"):
        return True
    before = node.args[0].meta.get("val") if name == "to" and isinstance(node.args[0], Node) else None
    return isinstance(before, Tensor) and before.dtype == node.meta["val"].dtype


def resolve(node: Node) -> Node:
    """The node behind aliases and the like."""
    while node.op == "call_function" and is_identity(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def users(node: Node) -> Iterator[Node]:
    """The ops (and outputs) that read a node, looking through aliases."""
    for u in node.users:
        if u.op == "call_function" and is_identity(u):
            yield from users(u)
        elif not skipped(u) or u.op == "output":
            yield u


def is_view(node: Node) -> bool:
    """True if the node computes nothing: its output shares its input's storage (or is a tuple element)."""
    if node.target is operator.getitem:
        return True
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target in (torch.ops.aten._unsafe_view.default, torch.ops.aten.lift_fresh_copy.default):
        return True
    returns = target._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def kernel_bytes(node: Node) -> float:
    """Bytes through device memory: each tensor operand read once, each output written once; lookups read what they return."""
    outs = [t for t in tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)]
    ins = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    written = sum(_nbytes(t) for t in outs)
    name = str(node.target)
    if name.startswith(("aten.embedding.", "aten.index.", "aten.gather.", "aten.index_select.")):
        return 2 * written
    if name.startswith(("aten.index_put", "aten.scatter")):
        return 2 * sum(_nbytes(t) for t in ins[1:])
    return written + sum(_nbytes(t) for t in ins)


def _nbytes(t: Tensor) -> float:
    return t.numel() * t.element_size()


def kernel_flops(node: Node) -> float:
    """FLOPs by torch's flop formulas (matrix products, convolutions, attention, experts); zero for all else."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet not in flop_registry:
        return 0.0

    def value(a: Any) -> Any:
        return a.meta["val"] if isinstance(a, Node) else a

    args = torch.fx.map_arg(node.args, value)
    kwargs = torch.fx.map_arg(node.kwargs, value)
    return float(flop_registry[packet](*args, **kwargs, out_val=node.meta["val"]))


def _attribute(graph: Graph, exported: Any, renamed: dict[str, str], batch: Batch) -> Joint:
    known = {n.name for n in exported.graph.nodes if not skipped(n)}
    order = [n for n in graph.nodes if n.op == "call_function"]
    by_seq: dict[int, str] = {}
    owner: dict[Node, str] = {}
    last = next((n.name for n in exported.graph.nodes if not skipped(n)), "")
    for node in order:
        backward = node.meta.get("partitioner_tag") == "is_backward"
        if backward:
            # the sum of two gradients carries no number of its own: it follows the op that made the second
            last = last if node.meta.get("is_gradient_acc") else by_seq.get(node.meta.get("seq_nr", -1), last)
        else:
            source = node.meta.get("from_node") or []
            name = renamed.get(source[0].name, source[0].name) if source else last
            last = name if name in known else last
            by_seq.setdefault(node.meta.get("seq_nr", -1), last)
        owner[node] = last

    joint = Joint(exported)
    roots: dict[Node, set[int]] = {}  # node -> the allocations that its value lives in
    time = 0
    nodes_of: list[int] = []
    number, running = 0, None
    for node in order:
        backward = node.meta.get("partitioner_tag") == "is_backward"
        this = (backward, node.meta.get("seq_nr"), node.meta.get("is_gradient_acc", False))
        number, running = (number, running) if this == running and backward and not this[2] else (number + 1, this)
        for used in _allocations_of(node.all_input_nodes, roots):
            joint.allocations[used].dies, joint.allocations[used].dies_backward = time, backward
        if is_view(node):
            roots[node] = _allocations_of(node.all_input_nodes[:1], roots)
            if node.target is operator.getitem and isinstance(node.args[0], Node):
                owned = sorted(roots[node.args[0]])
                index = node.args[1]
                roots[node] = {owned[index]} if isinstance(index, int) and index < len(owned) else set(owned)
            continue
        outs = [t for t in tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)]
        if not outs:
            continue
        roots[node] = set()
        if node.meta.get("is_gradient_acc"):  # autograd adds into the first one's storage
            roots[node] = _allocations_of(node.all_input_nodes[:1], roots)
            outs = []
        for t in outs:
            roots[node].add(len(joint.allocations))
            joint.allocations.append(Allocation(owner[node], batch.amount(_nbytes(t)), time, time, backward, backward))
        joint.kernels.append(Kernel(owner[node], backward, batch.amount(kernel_flops(node)), _byte_amount(node, batch)))
        nodes_of.append(number)
        time += 1
    for node in graph.output_node().all_input_nodes:
        for used in roots.get(node, ()):
            joint.allocations[used].result = joint.allocations[used].born_backward
    _hold_through_nodes(joint, nodes_of)
    return joint


def _hold_through_nodes(joint: Joint, nodes_of: list[int]) -> None:
    """Autograd frees what a backward node reads, its gradient, what was saved and its intermediate results, when the node is done.

    `nodes_of[t]` numbers the autograd node that kernel t belongs to.
    """
    last = {n: t for t, n in enumerate(nodes_of)}
    for a in joint.allocations:
        a.dies = min(a.dies, len(nodes_of) - 1)  # a view after the last kernel
        if a.dies_backward:
            a.dies = last[nodes_of[a.dies]]


def _byte_amount(node: Node, batch: Batch) -> Amount:
    """Bytes of one kernel, split into what grows with the batch and what does not (weights)."""
    total = kernel_bytes(node)
    tensors = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    tensors += [t for t in tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)]
    fixed = sum(_nbytes(t) for t in tensors if t.numel() % batch.prime)
    if not any(t.numel() and t.numel() % batch.prime == 0 for t in tensors):
        return Amount(const=total)
    if total % batch.prime == 0:
        return Amount(per_sample=total // batch.prime)
    fixed = min(fixed, total)
    return Amount(const=fixed, per_sample=(total - fixed) / batch.prime)


def _allocations_of(nodes: Iterable[Node], roots: dict[Node, set[int]]) -> set[int]:
    return set().union(*(roots.get(n, set()) for n in nodes)) if nodes else set()
