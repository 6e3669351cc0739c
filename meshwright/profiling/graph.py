"""ModelGraph: what a model computes, stores and saves, as data.

A `ModelGraph` holds the unique `Block`s of a model and the sequence in which they repeat. A `Block` holds its `Op`s in
topological order. Every count is affine in the batch: `Amount(const, per_sample)` at microbatch b is `const + b * per_sample`.
Shapes are those of one sample; `batch_dim` names the dimension that the batch multiplies.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Kind = Literal[
    "matmul",  # dims m, n, k (and groups for a batched product)
    "attention",  # dims heads, kv_heads, q, kv, head_dim, v_head_dim, causal
    "experts",  # grouped matmul; dims m, n, k, experts
    "conv",
    "norm",
    "softmax",
    "pointwise",
    "reduction",
    "embedding",
    "cross_entropy",
    "scan",
    "copy",  # moves bytes, computes nothing
    "view",  # free
    "constant",  # arange, zeros: no operand depends on the data
    "unknown",  # not modelled: priced by its outputs' bytes only, and reported
]

DTYPE_BYTES = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1, "complex64": 8,
}  # fmt: skip


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Amount(Frozen):
    """A count that is affine in the batch: const + batch * per_sample."""

    const: float = 0.0
    per_sample: float = 0.0

    def at(self, batch: float) -> float:
        return self.const + batch * self.per_sample

    def __add__(self, other: Amount) -> Amount:
        return Amount(const=self.const + other.const, per_sample=self.per_sample + other.per_sample)


class TensorSpec(Frozen):
    """Shape of one sample, dtype, and which dimension the batch multiplies (None: no dependence on the batch)."""

    shape: tuple[int, ...]
    dtype: str
    batch_dim: int | None = None

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def nbytes(self) -> int:
        """Bytes of one sample."""
        return self.numel * DTYPE_BYTES.get(self.dtype, 4)

    @property
    def amount(self) -> Amount:
        return Amount(per_sample=self.nbytes) if self.batch_dim is not None else Amount(const=self.nbytes)


class Work(Frozen):
    """What the kernels of one phase of one op do: floating-point operations of matrix products, bytes through device
    memory (each input read once, each output written once), and how many kernels are launched."""

    flops: Amount = Amount()
    bytes: Amount = Amount()
    launches: int = 0


class Storage(Frozen):
    """One allocation of a block's joint program, for liveness: when it is allocated and last used, in the order of the
    joint graph's kernels. `op` is the forward op that the storage belongs to."""

    op: str
    amount: Amount
    born: int
    dies: int
    saved: bool  # made in forward and needed by backward: an activation
    backward: bool = False  # made in backward
    gradient: bool = False  # of a parameter: it outlives the block


class Op(Frozen):
    """One operation of the forward graph (torch.export), with what its joint graph adds: backward work and saved bytes.

    `inputs` are value names: another op of the block ("linear_3", or "split:1" for its second output), "param:<fqn>" or
    "buffer:<fqn>" relative to the block, or "in:<i>" for the block's i-th input; `roles` are their names in the op's schema.
    `args` are the non-tensor arguments by name; an integer that the batch multiplies is written "B*<n>". `dims` are the
    sizes that cost it, of one sample; the batch multiplies the one named `batched`. `literals` maps a size written in the
    arguments ("split_size", "size[2]") to the attribute of a module that it follows in the model's own code
    ("attn.split_size"), so that a sharded run can set its local value; "!" before it says that it has none.
    """

    name: str
    kind: Kind
    target: str
    module: str
    inputs: tuple[str, ...]
    roles: tuple[str, ...] = ()
    args: dict[str, Any] = {}
    outputs: tuple[TensorSpec, ...]
    dims: dict[str, int] = {}
    batched: str = ""
    forward: Work = Work()
    backward: Work = Work()
    saved: Amount = Amount()
    requires_grad: bool = False
    literals: dict[str, str] = {}

    @property
    def dtype(self) -> str:
        return self.outputs[0].dtype if self.outputs else "float32"


class Parameter(Frozen):
    name: str  # relative to the block
    shape: tuple[int, ...]
    dtype: str
    trainable: bool = True

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n


class BlockInput(Frozen):
    """A value that enters a block. `carry`: made by the block before it. `data`: depends on the model's inputs (a side
    input that does not can be recomputed anywhere)."""

    spec: TensorSpec
    role: Literal["carry", "side", "batch"]
    source: str  # "in the graph": the value's name where it was made
    data: bool = True
    requires_grad: bool = True


class ModuleCall(Frozen):
    """One call of a submodule inside a block: which values go in (by argument path) and come out (by output path)."""

    module: str  # relative to the block
    inputs: dict[str, str]
    outputs: dict[str, str]


class Block(Frozen):
    """A unique stretch of the model: its ops, parameters, inputs and outputs. Names are relative to the block's module."""

    id: int
    name: str
    ops: tuple[Op, ...]
    params: tuple[Parameter, ...]
    buffers: tuple[Parameter, ...] = ()
    inputs: tuple[BlockInput, ...]
    outputs: tuple[str, ...]  # value names; the first is the carry
    calls: tuple[ModuleCall, ...] = ()
    storages: tuple[Storage, ...] = ()
    repeated: bool = False  # an element of a layer list

    @cached_property
    def by_name(self) -> dict[str, Op]:
        return {op.name: op for op in self.ops}

    def spec_of(self, value: str) -> TensorSpec:
        """The TensorSpec of a value name, "op", "op:i", "param:<name>" or "in:<i>"."""
        if value.startswith("in:"):
            return self.inputs[int(value[3:])].spec
        if value.startswith(("param:", "buffer:")):
            kind, _, path = value.partition(":")
            p = next(p for p in (self.params if kind == "param" else self.buffers) if p.name == path)
            return TensorSpec(shape=p.shape, dtype=p.dtype)
        name, _, index = value.partition(":")
        return self.by_name[name].outputs[int(index or 0)]

    def param(self, name: str) -> Parameter:
        for p in self.params:
            if p.name == name:
                return p
        raise KeyError(name)

    @property
    def numel(self) -> int:
        return sum(p.numel for p in self.params)

    def flops(self, batch: int = 1, backward: bool = False) -> float:
        return sum((op.backward if backward else op.forward).flops.at(batch) for op in self.ops)

    def saved_bytes(self, batch: int = 1) -> float:
        return sum(op.saved.at(batch) for op in self.ops)


class Occurrence(Frozen):
    """Where a block stands in the model: `path` is the module that it is (empty for ops between layers)."""

    block: int
    path: str


class Statement(Frozen):
    """One line of the code that surrounds the layers: a call of a submodule ("module:model.norm"), of a torch function
    ("aten:arange.default"), or an element of a tuple ("get:1").

    Arguments are JSON: a value of the program is {"ref": name}, a parameter or buffer {"attr": path}, a tuple
    {"tuple": [...]}, the run's device {"device": true}, a dtype {"dtype": "float32"}; an integer that the batch multiplies is
    "B*<n>".
    """

    target: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    outputs: tuple[str, ...]


class Program(Frozen):
    """A model as `stem; for each layer; head`: how a pipeline stage runs a part of it under the model's own names.

    `side` statements compute what every layer takes besides the carry (rotary tables, positions) and do not depend on the
    batch's data, so that any stage can run them on the carry it received. `layer_args`/`layer_kwargs` are the arguments
    of each layer call; the carry is {"ref": "h"}, as it is in `side`.
    """

    inputs: tuple[str, ...]
    stem: tuple[Statement, ...]
    side: tuple[Statement, ...]
    layers: tuple[str, ...]
    layer_args: tuple[Any, ...]
    layer_kwargs: dict[str, Any]
    head: tuple[Statement, ...]
    output: str


class ModelInput(Frozen):
    """One input of the model: `high` bounds random integers (a vocabulary), None for floats."""

    name: str
    spec: TensorSpec
    high: int | None = None


class ModelGraph(Frozen):
    """A traced model. `precision` is the dtype that the model computes in; `sequence` walks the blocks in order."""

    name: str
    source: str
    precision: str
    seq: int
    origin: Literal["hf", "module"]
    sample_source: str = ""
    objective: Literal["cross_entropy", "mse", "square", "custom"]
    labels_from: Literal["shift", "random", "sample", "none"]
    inputs: tuple[ModelInput, ...]
    labels: ModelInput | None = None
    blocks: tuple[Block, ...]
    sequence: tuple[Occurrence, ...]
    program: Program | None = None
    no_program: str = ""  # why there is no Program, in words
    tied: tuple[tuple[str, ...], ...] = ()  # groups of full parameter names that are one tensor
    numel: int  # of the whole model, tied parameters once
    notes: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[Occurrence, ...]:
        return tuple(o for o in self.sequence if self.blocks[o.block].repeated)

    def flops(self, batch: int = 1, backward: bool = False) -> float:
        """FLOPs of matrix products, convolutions and attention (full, not causal), as torch's FlopCounterMode counts."""
        return sum(self.blocks[o.block].flops(batch, backward) for o in self.sequence)

    def coverage(self) -> Coverage:
        kinds: Counter[str] = Counter()
        unknown: Counter[str] = Counter()
        for o in self.sequence:
            for op in self.blocks[o.block].ops:
                kinds[op.kind] += 1
                if op.kind == "unknown":
                    unknown[op.target] += 1
        free = kinds["view"] + kinds["constant"]
        total = sum(kinds.values())
        return Coverage(ops=total, modelled=total - free - kinds["unknown"], free=free, unknown=dict(unknown))

    @cached_property
    def hash(self) -> str:
        """Twelve hex digits that change when anything that costs or shards changes."""
        return hashlib.sha256(self.model_dump_json(exclude={"source", "name", "notes"}).encode()).hexdigest()[:12]


class Coverage(Frozen):
    """How many ops of the whole model are modelled, free (views, constants) and not modelled, the last by name."""

    ops: int
    modelled: int
    free: int
    unknown: dict[str, int] = {}

    def __str__(self) -> str:
        text = f"{self.ops} ops: {self.modelled} modelled, {self.free} free, {sum(self.unknown.values())} not modelled"
        names = ", ".join(f"{name} x{n}" for name, n in sorted(self.unknown.items()))
        return f"{text}: {names}" if names else text
