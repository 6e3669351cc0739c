"""Anything torch -> ModelGraph: export two layers of each kind on meta, link the joint graph, replicate."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from meshwright.profiling import ops
from meshwright.profiling.blocks import ROOT, Segment, make_block, naming, segments, structure_hash
from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import Block, ModelGraph, ModelInput, Occurrence, Program
from meshwright.profiling.joint import PRIMES, Batch, export, is_identity, resolve, trace_joint, users
from meshwright.profiling.literals import probe_all
from meshwright.profiling.live import Sample, load_live
from meshwright.profiling.loading import Loaded, load, main_output, one_line
from meshwright.profiling.program import NotSequential, make_program
from meshwright.profiling.structure import Chain, find_chains, shortened


class _TrainStep(nn.Module):
    """The model and its loss as one module: what is traced."""

    def __init__(self, loaded: Loaded, keys: list[str]) -> None:
        super().__init__()
        self.model = loaded.module
        self._loaded, self._keys = loaded, keys

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> Tensor:
        positional = [inputs[k] for k in self._keys if k not in self._loaded.kwargs]
        keywords = {k: inputs[k] for k in self._keys if k in self._loaded.kwargs}
        output = self.model(*positional, **keywords)
        if self._loaded.objective != "custom":
            output = main_output(output)
        return self._loaded.loss(output, labels)


def trace(source: str | nn.Module, *, seq: int, precision: str = "bf16", sample: str | Sample | None = None) -> ModelGraph:
    """Traces a model named by `source` (see loading.load), or a live module with a sample of its inputs (see live.Sample), at sequence
    length `seq`. A live module is not changed.

    Raises InputError if the source is not a model or cannot be traced; the sentence names the model and the cause.
    """
    if not 1 <= seq <= 10**9:
        raise InputError("the sequence length is at least 1 and at most 1,000,000,000")
    prime = PRIMES[0]
    read: Any = load if isinstance(source, str) else load_live
    with _quiet():
        loaded = read(source, batch=prime, seq=seq, precision=precision, sample=sample)
        sizes = {s for p in loaded.module.parameters() for s in p.shape} | {seq}
        while any(s % prime == 0 for s in sizes if s):
            prime = PRIMES[PRIMES.index(prime) + 1]
            loaded = read(source, batch=prime, seq=seq, precision=precision, sample=sample)
        ops.register_flops()
        with ops.traceable(loaded.module):
            return _trace_loaded(loaded, seq, precision, Batch(prime))


def _trace_loaded(loaded: Loaded, seq: int, precision: str, batch: Batch) -> ModelGraph:
    keys = [f"input_{i}" for i in range(len(loaded.args))] + list(loaded.kwargs)
    tensors = dict(zip(keys, [*loaded.args, *loaded.kwargs.values()], strict=True))
    try:
        chains = find_chains(loaded.module, loaded.args, loaded.kwargs)
    except Exception as e:
        raise InputError(f"{loaded.source}: the model does not run on its inputs: {one_line(e)}") from None
    inputs = dict(tensors)
    if loaded.labels is not None:
        inputs["labels"] = loaded.labels
    step = _TrainStep(loaded, keys)
    # Two of each kind are enough unless the first differs from the rest (it takes the stem's dtype); then three are.
    for copies in (2, 3):
        if all(len(c.kept(copies)) == len(c.kinds) for c in chains):
            break
        try:
            with shortened(loaded.module, chains, copies):
                return _assemble(loaded, step, inputs, keys, seq, precision, batch, chains, copies)
        except (_Mismatch, InputError):
            continue  # not a beginning of the model after all
    return _assemble(loaded, step, inputs, keys, seq, precision, batch, chains, 0)


class _Mismatch(Exception):
    """Layers of one structural class traced to different graphs."""


def _assemble(
    loaded: Loaded, step: _TrainStep, inputs: dict[str, Any], keys: list[str], seq: int, precision: str, batch: Batch,
    chains: tuple[Chain, ...], copies: int,
) -> ModelGraph:  # fmt: skip
    exported, joint = _two_programs(loaded, step, inputs, batch)
    nm = naming(exported, step, *probe_all(loaded.module, loaded.args, loaded.kwargs))
    traced = {_join(ROOT, chain.path, str(position)): (chain, index) for chain in chains for position, index in enumerate(chain.kept(copies))}
    parts = segments(exported, list(traced))
    if [p.path for p in parts if p.path] != list(traced):
        if copies:
            raise _Mismatch
        chains, traced = (), {}  # the layers' ops interleave: one block
        parts = segments(exported, [])
    made = [make_block(i, part, exported, joint, step, nm, batch, _carry_into(exported, parts, i, nm)) for i, part in enumerate(parts)]
    blocks: list[Block] = []
    sequence: list[Occurrence] = []
    for chain, members in _by_chain(parts, made, traced):
        if chain is None:
            name = "model" if len(made) == 1 else "stem" if not blocks else "head" if members[0] is made[-1] else "between"
            blocks.append(members[0].model_copy(update={"id": len(blocks), "name": name}))
            sequence.append(Occurrence(block=blocks[-1].id, path=""))
            continue
        unique, choice = _unique(chain, copies, members)
        sequence += [Occurrence(block=len(blocks) + c, path=_join(chain.path, str(j))) for j, c in enumerate(choice)]
        blocks += [b.model_copy(update={"id": len(blocks) + i}) for i, b in enumerate(unique)]
    program, why = _program(loaded, exported, step, traced, chains, nm, batch)
    return ModelGraph(
        name=loaded.name, source=loaded.source, precision=precision, seq=seq, origin=loaded.origin,  # type: ignore[arg-type]
        sample_source=loaded.sample_source, objective=loaded.objective, labels_from=loaded.labels_from,  # type: ignore[arg-type]
        inputs=tuple(ModelInput(name=k, spec=batch.spec(inputs[k]), high=loaded.high.get(k)) for k in keys),
        labels=None if loaded.labels is None else ModelInput(name="labels", spec=batch.spec(loaded.labels), high=loaded.high.get("labels")),
        blocks=tuple(blocks), sequence=tuple(sequence), program=program, no_program=why, tied=_tied(loaded.module),
        numel=sum(p.numel() for p in _whole(loaded.module, chains, copies)), notes=tuple(loaded.notes),
    )  # fmt: skip


def _by_chain(parts: list[Segment], made: list[Block], traced: dict[str, tuple[Chain, int]]) -> Iterator[tuple[Chain | None, list[Block]]]:
    """Blocks in order of execution, the layers of one chain together."""
    for chain, group in itertools.groupby(zip(parts, made, strict=True), key=lambda x: traced[x[0].path][0] if x[0].path else None):
        members = [block for _, block in group]
        if chain is None:
            yield from ((None, [m]) for m in members)
        else:
            yield chain, members


def _unique(chain: Chain, copies: int, members: list[Block]) -> tuple[list[Block], list[int]]:
    """The distinct blocks among a chain's traced layers, and for every layer of the chain which one it is.

    Layers that were not traced are like the last traced one of their kind, which must equal the one before it.
    """
    kept = chain.kept(copies)
    hashes = [(chain.kinds[i], structure_hash(b)) for i, b in zip(kept, members, strict=True)]
    for kind, total in Counter(chain.kinds).items():
        own = [h for h in hashes if h[0] == kind]
        if total > len(own) and own[-1] != own[-2]:
            raise _Mismatch
    distinct = list(dict.fromkeys(hashes))
    blocks = [members[hashes.index(h)] for h in distinct]
    last = {h[0]: distinct.index(h) for h in hashes}
    exact = {i: distinct.index(h) for i, h in zip(kept, hashes, strict=True)}
    return blocks, [exact.get(i, last[kind]) for i, kind in enumerate(chain.kinds)]


def _two_programs(loaded: Loaded, step: _TrainStep, inputs: dict[str, Any], batch: Batch) -> tuple[Any, Any]:
    try:
        exported = export(step, inputs)
    except Exception as e:
        raise InputError(f"{loaded.source} cannot be traced: {one_line(e)}") from None
    try:
        return exported, trace_joint(exported, inputs, batch)
    except Exception as e:
        raise InputError(f"{loaded.source}: its backward cannot be traced: {one_line(e)}") from None


def _join(*parts: str) -> str:
    return ".".join(p for p in parts if p)


def _carry_into(exported: Any, parts: list[Segment], i: int, nm: Any) -> Any:
    """The node that segment i takes from the segment before it: the largest value made there that it reads."""
    if i == 0:
        return None
    before = {n.name for n in parts[i - 1].nodes}
    mine = {n.name for n in parts[i].nodes}
    candidates = [
        n
        for n in exported.graph.nodes
        if n in nm.names and nm.names[n].partition(":")[0] in before and isinstance(n.meta.get("val"), Tensor)
        and not is_identity(n) and n.meta["val"].is_floating_point() and any(u.name in mine for u in users(n))
    ]  # fmt: skip
    made_last = [n for n in candidates if _is_returned(exported, parts[i - 1].path, n)]
    return max(made_last or candidates, key=lambda n: n.meta["val"].numel(), default=None)


def _is_returned(exported: Any, path: str, node: Any) -> bool:
    if not path:
        return False
    for e in exported.module_call_graph:
        if e.fqn == path and e.signature is not None:
            nodes = {n.name: n for n in exported.graph.nodes}
            returned = [nodes[a.name] for a in e.signature.outputs if getattr(a, "name", None) in nodes]
            return any(resolve(n) is node for n in returned)
    return False


def _program(
    loaded: Loaded, exported: Any, step: nn.Module, traced: dict[str, tuple[Chain, int]], chains: tuple[Chain, ...], nm: Any, batch: Batch
) -> tuple[Program | None, str]:
    if len(chains) != 1:
        what = "no list of layers that it walks in order" if not chains else f"{len(chains)} lists of layers"
        return None, f"the model has {what}"
    if any("sliding window" in n for n in loaded.notes):
        return None, "its attention mask (a sliding window) is made outside its layers"
    chain = chains[0]
    every = [_join(chain.path, str(j)) for j in range(len(chain.kinds))]
    try:
        return make_program(exported, step, ROOT, list(traced), every, nm, batch), ""
    except NotSequential as e:
        return None, str(e)


def _whole(module: nn.Module, chains: tuple[Chain, ...], copies: int) -> Iterator[nn.Parameter]:
    """Parameters of the full model while it may be shortened: a layer that was dropped counts like its class."""
    yield from module.parameters()
    for chain in chains:
        container: Any = module.get_submodule(chain.path)
        kept = chain.kept(copies)
        position = {chain.kinds[i]: p for p, i in enumerate(kept)}
        for index, kind in enumerate(chain.kinds):
            if index not in kept:
                yield from container[position[kind]].parameters()


def _tied(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    groups: dict[int, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(p), []).append(name)
    return tuple(tuple(g) for g in groups.values() if len(g) > 1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Tracing warns a lot about what it does on purpose."""
    names = ("torch.export", "torch._export", "torch.fx", "transformers", "torch._dynamo")
    levels = {n: logging.getLogger(n).level for n in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in names:
            logging.getLogger(n).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for n, level in levels.items():
                logging.getLogger(n).setLevel(level)
