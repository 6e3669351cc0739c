"""From an exported and a joint graph to unique Blocks: segments by layer, ops with their work, structure compared as graphs."""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from meshwright.profiling.graph import (
    Amount,
    Block,
    BlockInput,
    ModuleCall,
    Op,
    Parameter,
    Storage,
    Work,
)  # fmt: skip
from meshwright.profiling.joint import Batch, Joint, is_identity, resolve, skipped, users
from meshwright.profiling.kinds import dims_of, kind_of, op_name
from meshwright.profiling.literals import COUNTED, FILLED, SIZED, UNSETTABLE, Call

ROOT = "model"  # the traced module wraps the user's model under this name
LOSS = "@loss"  # the module of ops that the objective adds after the model


@dataclass
class Segment:
    """Consecutive ops of the exported graph: one layer (`path` is its module), or what lies between layers (path "")."""

    path: str
    nodes: list[Node] = field(default_factory=list)


@dataclass
class Naming:
    """Where each node's value comes from: an op ("linear_3", "split:1"), a parameter, a buffer or an input."""

    names: dict[Node, str]
    params: dict[str, nn.Parameter]
    aliases: dict[str, list[str]]  # parameter name -> every name of the same tensor
    inputs: dict[str, Tensor]
    literals: dict[str, list[Call]]  # module path -> its calls that take sizes
    once: frozenset[str]  # paths of modules that are called exactly once

    def own_name(self, path: str, user: str) -> str:
        """Of a tied parameter's names the one inside the module `user` that reads it."""
        return next((a for a in self.aliases.get(path, ()) if a.rpartition(".")[0] == user), path)


def naming(exported: Any, module: nn.Module, literals: dict[str, list[Call]], once: frozenset[str]) -> Naming:
    """Names every node of the exported graph by full path ("param:model.layers.0...", without the wrapper's own name)."""
    spec = exported.graph_signature
    names: dict[Node, str] = {}
    inputs: dict[str, Tensor] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            if node.name in spec.inputs_to_parameters:
                names[node] = "param:" + spec.inputs_to_parameters[node.name]
            elif node.name in spec.inputs_to_buffers:
                names[node] = "buffer:" + spec.inputs_to_buffers[node.name]
            elif node.name in spec.inputs_to_lifted_tensor_constants:
                names[node] = "buffer:" + spec.inputs_to_lifted_tensor_constants[node.name]
            else:
                names[node] = "input:" + node.name
                inputs[node.name] = node.meta["val"]
        elif node.target is operator.getitem:
            names[node] = f"{names[node.args[0]]}:{node.args[1]}"
        elif node.op == "call_function" and is_identity(node):
            names[node] = names[node.args[0]]
        elif node.op == "call_function":
            names[node] = node.name
    params = dict(module.named_parameters(remove_duplicate=False))
    groups: dict[int, list[str]] = defaultdict(list)
    for name, p in params.items():
        groups[id(p)].append(name)
    aliases = {name: groups[id(p)] for name, p in params.items() if len(groups[id(p)]) > 1}
    known = {f"{ROOT}.{k}": v for k, v in literals.items()}
    return Naming(names, params, aliases, inputs, known, frozenset(f"{ROOT}.{p}" for p in once))


def segments(exported: Any, layers: Sequence[str]) -> list[Segment]:
    """Splits the exported graph's ops by the layer paths in `layers`, in order of execution."""
    found = [Segment("")]
    wanted = set(layers)
    for node in exported.graph.nodes:
        if skipped(node):
            continue
        stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        path = next((p for p in stack if p in wanted), "")
        if path != found[-1].path:
            found.append(Segment(path))
        found[-1].nodes.append(node)
    return [s for s in found if s.nodes or s.path]


def make_block(number: int, segment: Segment, exported: Any, joint: Joint, module: nn.Module, nm: Naming, batch: Batch, carry: Node | None) -> Block:
    """One Block from one segment: ops with work, saved bytes and literals, named relative to the segment's module."""
    mine = {n.name for n in segment.nodes}

    def rel(path: str) -> str:
        """A module path relative to the segment's own module ("" is the segment itself)."""
        top = segment.path or ROOT
        return "" if path == top else path.removeprefix(top + ".")

    ins: dict[Node, str] = {}
    block_inputs: list[BlockInput] = []
    ops: list[Op] = []
    tensors: dict[str, dict[str, Parameter]] = {"param": {}, "buffer": {}}

    def value(node: Node, user: str = "") -> str:
        node = resolve(node)
        name = nm.names[node]
        if name.startswith(("param:", "buffer:")):
            kind, _, path = name.partition(":")
            path = nm.own_name(path, user) if kind == "param" else path
            t = nm.params[path] if kind == "param" else node.meta["val"]
            tensors[kind][rel(path)] = Parameter(
                name=rel(path), shape=tuple(t.shape), dtype=batch.spec(t).dtype, trainable=kind == "param" and t.requires_grad
            )
            return f"{kind}:{rel(path)}"
        if name.partition(":")[0] in mine:
            return name
        if node not in ins:
            ins[node] = f"in:{len(block_inputs)}"
            role = "carry" if node is carry else "batch" if name.startswith("input:") else "side"
            val = node.meta["val"]
            block_inputs.append(
                BlockInput(spec=batch.spec(val), role=role,  # type: ignore[arg-type]
                    source=name, data=depends_on_data(node), requires_grad=_requires_grad(node, nm))
            )  # fmt: skip
        return ins[node]

    if carry is not None:
        value(carry)
    for node in segment.nodes:
        ops.append(_make_op(node, value, rel, module, nm, batch))
    ops = _with_literals(
        _with_work(ops, joint, mine), {rel(path): calls for path, calls in nm.literals.items() if path.startswith(segment.path or ROOT)}
    )
    ops, merged = _copies_as_cat(ops)
    # What leaves: values that a later op (or the loss) reads; a layer's own return value first.
    returned = _returned(exported, segment.path)
    used = [n for n in _leaving(exported, segment, mine) if n not in returned]
    outputs = [value(n) for n in [*returned, *used] if nm.names[n].partition(":")[0] in mine]
    calls = _calls(exported, segment, nm, value, rel, mine, ins)
    storages = [s.model_copy(update={"op": merged.get(s.op, s.op)}) for s in _storages(joint, mine)]
    return Block(
        id=number, name=segment.path.removeprefix(ROOT + "."), ops=tuple(ops),
        params=tuple(tensors["param"][name] for name in map(rel, nm.params) if name in tensors["param"]), buffers=tuple(tensors["buffer"].values()),
        inputs=tuple(block_inputs), outputs=tuple(dict.fromkeys(outputs)), calls=tuple(calls), storages=tuple(storages),
        repeated=bool(segment.path),
    )  # fmt: skip


def _make_op(node: Node, value: Any, rel: Any, module: nn.Module, nm: Naming, batch: Batch) -> Op:
    kind = kind_of(node.target)
    tensors: dict[str, Tensor] = {}
    inputs: list[str] = []
    roles: list[str] = []
    args: dict[str, Any] = {}
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    path = stack[-1] if stack else ""

    def add(role: str, a: Any) -> None:
        if isinstance(a, Node):
            v = a.meta.get("val")
            if isinstance(v, Tensor):
                inputs.append(value(a, path))
                roles.append(role)
                tensors.setdefault(role, v)
        elif isinstance(a, list | tuple) and any(isinstance(x, Node) for x in a):
            for i, x in enumerate(a):
                add(f"{role}.{i}", x)
        elif a is not None:
            args[role] = batch.arg(a)

    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema.arguments
        for s, a in zip(schema, node.args, strict=False):
            add(s.name, a)
        for key, a in node.kwargs.items():
            if key not in ("device", "layout", "pin_memory"):
                add(key, a)
    else:
        for i, a in enumerate(node.args):
            add(str(i), a)
    outs = [t for t in tree_leaves(node.meta["val"]) if isinstance(t, Tensor)]
    if kind == "constant" and any(depends_on_data(n) for n in node.all_input_nodes):
        kind = "pointwise"
    dims, batched = dims_of(kind, op_name(node.target), tensors, args, outs[0], batch.prime) if outs else ({}, "")
    target = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else op_name(node.target)
    return Op(
        name=node.name, kind=kind, target=target, module=rel(path) if ROOT in stack else LOSS, inputs=tuple(inputs), roles=tuple(roles), args=args,
        outputs=tuple(batch.spec(t) for t in outs), dims=dims, batched=batched, requires_grad=_requires_grad(node, nm),
    )  # fmt: skip


def _with_work(ops: list[Op], joint: Joint, mine: set[str]) -> list[Op]:
    """Adds each op's kernels and saved bytes from the joint graph."""
    work: dict[tuple[str, bool], list[Any]] = defaultdict(list)
    for k in joint.kernels:
        if k.op in mine:
            work[k.op, k.backward].append(k)
    saved: dict[str, Amount] = defaultdict(Amount)
    for a in joint.allocations:
        if a.op in mine and not a.born_backward and a.dies_backward:
            saved[a.op] = saved[a.op] + a.amount

    def total(kernels: list[Any]) -> Work:
        flops, moved = Amount(), Amount()
        for k in kernels:
            flops, moved = flops + k.flops, moved + k.bytes
        return Work(flops=flops, bytes=moved, launches=len(kernels))

    return [
        op.model_copy(update={"forward": total(work[op.name, False]), "backward": total(work[op.name, True]), "saved": saved[op.name]})
        for op in ops
    ]  # fmt: skip


def _copies_as_cat(ops: list[Op]) -> tuple[list[Op], dict[str, str]]:
    """An empty tensor that is filled slice by slice along one dimension is a concatenation, and is written as one.

    Returns the ops and, for each op that was merged, the op that stands for it.
    """
    by_name = {op.name: op for op in ops}
    out = list(ops)
    stands_for: dict[str, str] = {}
    for op in ops:
        if _named(op) not in ("new_empty", "empty", "empty_like"):
            continue
        slices = [o for o in ops if op.name in o.inputs and _named(o) == "slice"]
        copies = [next((c for c in ops if _named(c) == "copy_" and c.inputs[:1] == (s.name,)), None) for s in slices]
        dims = {s.args.get("dim", 0) for s in slices}
        if len(slices) < 2 or None in copies or len(dims) != 1:
            continue
        dim = int(dims.pop())
        if sum(s.outputs[0].shape[dim] for s in slices) != op.outputs[0].shape[dim]:
            continue
        parts = [by_name[c.name] for c in copies if c is not None]
        merged = [op, *slices, *parts]
        whole = op.model_copy(
            update={
                "kind": "copy", "target": "aten.cat.default", "inputs": tuple(c.inputs[1] for c in parts),
                "roles": tuple(f"tensors.{i}" for i in range(len(parts))), "args": {"dim": dim},
                "forward": _sum_work(o.forward for o in merged), "backward": _sum_work(o.backward for o in merged),
                "saved": sum((o.saved for o in merged), Amount()), "requires_grad": any(c.requires_grad for c in parts),
            }
        )  # fmt: skip
        gone = {o.name for o in merged}
        stands_for |= dict.fromkeys(gone, op.name)
        last = out.index(parts[-1])
        out = [o for o in out[:last] if o.name not in gone] + [whole] + [o for o in out[last:] if o.name not in gone]
    return out, stands_for


def _sum_work(parts: Iterable[Work]) -> Work:
    total = Work()
    for w in parts:
        total = Work(flops=total.flops + w.flops, bytes=total.bytes + w.bytes, launches=total.launches + w.launches)
    return total


def _with_literals(ops: list[Op], probed: dict[str, list[Call]]) -> list[Op]:
    """Adds to each op which sizes in its arguments follow which attribute.

    A size in a module whose probe did not see the calls that the export saw may follow anything: it is marked unsettable.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)
    seen: set[str] = set()
    for path, names in itertools.product(probed, (SIZED, FILLED, frozenset(COUNTED))):
        mine = [op for op in ops if _named(op) in names and (op.module == path or op.module.startswith(path + "."))]
        calls = [c for c in probed[path] if _plain_name(c.name) in names]
        if [_plain_name(_named(op)) for op in mine] != [_plain_name(c.name) for c in calls]:
            continue
        if names is SIZED:
            seen.add(path)
        for op, call in zip(mine, calls, strict=True):
            for position, attribute in call.follows.items():
                mark = UNSETTABLE if attribute.startswith(UNSETTABLE) else ""
                found[op.name][_where(op, position)] = f"{mark}{path}.{attribute.removeprefix(UNSETTABLE)}"
    for op in ops:
        if _named(op) in SIZED and op.module not in seen:
            for key, arg in op.args.items():
                for i, size in enumerate(arg if isinstance(arg, list) else []):
                    if isinstance(size, int) and size > 1:
                        found[op.name].setdefault(f"{key}[{i}]", UNSETTABLE + op.module)
    return [op.model_copy(update={"literals": found[op.name]}) if op.name in found else op for op in ops]


def _named(op: Op) -> str:
    return op.target.split(".")[1] if "." in op.target else op.target


def _plain_name(name: str) -> str:
    return name.removesuffix("_with_sizes")


def _where(op: Op, position: int) -> str:
    """The argument that holds the size at this position of a call."""
    if _named(op) in COUNTED:
        return COUNTED[_named(op)]
    key = next((k for k, v in op.args.items() if isinstance(v, list)), "")
    return f"{key}[{position}]" if key and _named(op) != "unflatten" else "split_size" if "split_size" in op.args else str(position)


def _storages(joint: Joint, mine: set[str]) -> list[Storage]:
    """Allocations of the block on its own clock: its kernels of the joint graph in order, forward before backward."""
    clock = [t for t, k in enumerate(joint.kernels) if k.op in mine]
    local = {t: i for i, t in enumerate(clock)}
    forward = sum(1 for t in clock if not joint.kernels[t].backward)
    # A kernel may write several allocations; `born` counts allocating nodes, which are exactly the kernels.
    out = []
    for a in joint.allocations:
        if a.op not in mine or a.born not in local:
            continue
        dies = local.get(a.dies)
        if dies is None:  # last used by another block, which runs after this one's forward and before its backward
            dies = len(clock) - 1 if a.born_backward else forward - 1
        saved = not a.born_backward and a.dies_backward
        out.append(
            Storage(
                op=a.op, amount=a.amount, born=local[a.born], dies=max(dies, local[a.born]), saved=saved, backward=a.born_backward, gradient=a.result
            )
        )  # fmt: skip
    return out


def depends_on_data(node: Node) -> bool:
    """Whether a value depends on the model's inputs (not only on constants, parameters and buffers)."""
    if "mw_data" not in node.meta:
        if node.op == "placeholder":
            node.meta["mw_data"] = not node.name.startswith(("p_", "b_", "c_"))
        else:
            node.meta["mw_data"] = any(depends_on_data(n) for n in node.all_input_nodes)
    return bool(node.meta["mw_data"])


def depends_on_parameters(node: Node, nm: Naming) -> bool:
    """Whether a trainable parameter feeds the value."""
    if "mw_param" not in node.meta:
        name = nm.names.get(node, "")
        if name.startswith("param:"):
            node.meta["mw_param"] = nm.params[name[6:]].requires_grad
        else:
            node.meta["mw_param"] = any(depends_on_parameters(n, nm) for n in node.all_input_nodes)
    return bool(node.meta["mw_param"])


def _requires_grad(node: Node, nm: Naming) -> bool:
    val = node.meta.get("val")
    leaves = [t for t in tree_leaves(val) if isinstance(t, Tensor)]
    return any(t.is_floating_point() for t in leaves) and op_name(node.target) != "wrap_with_set_grad_enabled" and depends_on_parameters(node, nm)


def _leaving(exported: Any, segment: Segment, mine: set[str]) -> list[Node]:
    out = []
    for node in exported.graph.nodes:
        base = node.args[0] if node.target is operator.getitem else node
        if isinstance(base, Node) and base.name in mine and not is_identity(node) and any(u.name not in mine for u in users(node)):
            out.append(node)
    return out


def call_entries(exported: Any) -> dict[str, Any]:
    """Module path -> its call signature (which nodes go in and come out)."""
    return {e.fqn: e.signature for e in exported.module_call_graph if e.signature is not None}


def _by_name(exported: Any) -> dict[str, Node]:
    return {n.name: n for n in exported.graph.nodes}


def _returned(exported: Any, path: str) -> list[Node]:
    signature = call_entries(exported).get(path) if path else None
    if signature is None:
        return []
    nodes = _by_name(exported)
    return [resolve(nodes[a.name]) for a in signature.outputs if getattr(a, "name", "") in nodes]


def _calls(exported: Any, segment: Segment, nm: Naming, value: Any, rel: Any, mine: set[str], ins: dict[Node, str]) -> list[ModuleCall]:
    """Calls of submodules that are called once inside the segment, with the block's own value names."""
    nodes = _by_name(exported)
    touched: list[str] = []
    for node in segment.nodes:
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            if path and path not in touched and (not segment.path or path.startswith(segment.path + ".")):
                touched.append(path)

    def named(arguments: Any, spec: Any, side: str) -> dict[str, str]:
        out = {}
        for key, a in zip(leaf_paths(spec, side), arguments, strict=False):
            node = nodes.get(getattr(a, "name", ""))
            if node is None or node not in nm.names:
                continue
            node = resolve(node)
            base = nm.names[node].partition(":")[0]
            if base in mine or node in ins:
                out[key] = value(node)
        return out

    calls = []
    for path, s in call_entries(exported).items():
        if path in touched and path != segment.path and path in nm.once:
            calls.append(ModuleCall(module=rel(path), inputs=named(s.inputs, s.in_spec, "in"), outputs=named(s.outputs, s.out_spec, "out")))
    return calls


def leaf_paths(spec: Any, side: str) -> list[str]:
    """Names of the leaves of a call's pytree: "0", "hidden_states", "position_embeddings.0"; "" for a bare tensor."""
    from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

    filled = tree_unflatten([0] * spec.num_leaves, spec)
    keys = [keystr(k) for k, _ in tree_flatten_with_path(filled)[0]]
    if side == "in":  # (args, kwargs): "[0][1]" is positional 1, "[1]['x']" is the keyword x
        keys = [k[3:] for k in keys]
    return [k.replace("['", ".").replace("']", "").replace("[", ".").replace("]", "").lstrip(".") for k in keys]


def _entering(block: Block, i: int) -> str:
    """What the block's input i is: a first layer that takes the batch itself has no gradient to hand back."""
    x = block.inputs[i]
    return f"in{x.spec.shape} {x.role} {x.requires_grad}"


def structure_hash(block: Block) -> str:
    """Equal for blocks that are the same graph: Weisfeiler-Lehman hash over ops, their shapes and parameters, and what enters."""
    import networkx as nx

    g = nx.DiGraph()
    for op in block.ops:
        label = (op.kind, op.target, op.module, str([(o.shape, o.dtype) for o in op.outputs]), str(sorted(op.args.items())))
        g.add_node(op.name, label=str(label))
        for i, source in zip(op.roles, op.inputs, strict=True):
            base = source.partition(":")[0] if not source.startswith(("param:", "buffer:", "in:")) else source
            if base not in g:
                g.add_node(base, label=_entering(block, int(source[3:])) if source.startswith("in:") else source)
            g.add_edge(base, op.name, role=i)
    return str(nx.weisfeiler_lehman_graph_hash(g, node_attr="label", edge_attr="role", iterations=4))
