"""Plan: the one document that says how to run a model and why. Everything downstream reads a Plan and nothing else."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from meshwright.planner.states import CONVERSIONS, parse
from meshwright.profiling.cluster import Cluster, first_error
from meshwright.profiling.errors import InputError
from meshwright.profiling.files import write_atomically
from meshwright.profiling.graph import Coverage, ModelInput, Statement

SCHEMA: Final = "meshwright.plan/1"
Count = Annotated[int, Field(ge=1)]
Bytes = Annotated[float, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Workload(_Model):
    """What is asked: training with this global batch (samples a step) and sequence length (tokens a sample)."""

    kind: Literal["train"] = "train"
    global_batch: Count
    seq: Count
    precision: Literal["bf16", "fp32"] = "bf16"
    optimizer: Literal["adamw", "sgd-momentum", "sgd"] = "adamw"


Schedule = Literal["1f1b", "gpipe", "interleaved", "zero-bubble", "zbv", "dualpipev", "looped-bfs"]
Recompute = Literal["none", "selective", "full"]


class Layout(_Model):
    """Degrees of parallelism. Devices are tp x cp x pp x dp.

    `zero` is the ZeRO stage of the data-parallel group; with `replicas` > 1 it shards inside each of so many groups, which hold
    equal copies (HSDP). Context-parallel ranks hold parts of the same samples, in a ring or by all-to-all over heads (`cp_kind`),
    and shard the state with the data-parallel ones. Experts are laid over the same devices, folded: etp x ep x their own replicas
    = tp x cp x dp. `vpp` chunks of the model on each pipeline rank. `recompute` is that of every stage, or "by stage" where they
    differ (Stage.recompute). `state_dtype`: of the optimizer's moments; `offload`: what stands in the host's memory.
    """

    tp: Count = 1
    sp: bool = False
    cp: Count = 1
    cp_kind: Literal["ring", "ulysses"] = "ring"
    pp: Count = 1
    vpp: Count = 1
    dp: Count = 1
    zero: Annotated[int, Field(ge=0, le=3)] = 0
    replicas: Count = 1
    ep: Count = 1
    etp: Count = 1
    micro_batch: Count = 1
    recompute: Literal["none", "selective", "full", "by stage"] = "none"
    schedule: Schedule = "1f1b"
    loss: Literal["plain", "chunked", "vocab_parallel"] = "plain"
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    offload: Literal["none", "optimizer"] = "none"

    @property
    def devices(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    @property
    def replicate(self) -> int:
        """Data-parallel ranks that hold whole copies: all of them for ZeRO 0."""
        return self.dp if self.zero == 0 else self.replicas

    @property
    def shard(self) -> int:
        """Data-parallel ranks that share one copy (ZeRO 1 to 3)."""
        return self.dp // self.replicate

    def __str__(self) -> str:
        parts = [f"tp={self.tp}{'+sp' if self.sp else ''}"]
        parts += [f"cp={self.cp} ({self.cp_kind})"] if self.cp > 1 else []
        parts += [f"ep={self.ep}{f' etp={self.etp}' if self.etp > 1 else ''}"] if self.ep * self.etp > 1 else []
        parts += [f"pp={self.pp}{f' vpp={self.vpp}' if self.vpp > 1 else ''}"]
        parts += [f"dp={self.dp if self.replicas == 1 else f'{self.replicas}x{self.shard}'} zero={self.zero} micro_batch={self.micro_batch}"]
        parts += [f"recompute={self.recompute}"]
        parts += [f"schedule={self.schedule}"] if self.schedule != "1f1b" else []
        parts += ["loss=chunked"] if self.loss == "chunked" else []
        parts += [f"state_dtype={self.state_dtype}"] if self.state_dtype != "fp32" else []
        parts += [f"offload={self.offload}"] if self.offload != "none" else []
        return " ".join(parts)


class Stage(_Model):
    """One pipeline stage: layers [first, last) of the model's layer list, with its own memory and time of a microbatch.

    `recompute` is that of its first `recompute_layers` layers, or of all where that is None; the others recompute nothing. With
    several chunks a rank (vpp) `layers` is the first of them and `chunks` holds all. `live_bytes`: tensors at the fullest moment;
    `peak_bytes`: what the driver sees for them (p50)."""

    layers: tuple[int, int]
    chunks: tuple[tuple[int, int], ...] = ()
    recompute: Recompute = "none"
    recompute_layers: Annotated[int, Field(ge=0)] | None = None
    live_bytes: Bytes = 0
    peak_bytes: Bytes
    microbatch_s: Seconds

    def recompute_of(self, i: int) -> str:
        """What the stage's i-th layer recomputes."""
        return self.recompute if self.recompute_layers is None or i < self.recompute_layers else "none"


class ModuleSharding(_Model):
    """How one module runs on a tensor-parallel rank (states: planner/states.py).

    `params`: state of each parameter that its forward reads. `inputs`, `outputs`: conversions by argument ("0", "hidden_states")
    or result ("" for a bare tensor, "0" for the first of a tuple). `sizes`: attributes to set to their local value.
    """

    module: str
    params: dict[str, str] = {}
    inputs: dict[str, str] = {}
    outputs: dict[str, str] = {}
    sizes: dict[str, int] = {}


class LayerSharding(_Model):
    """The modules of equal layers, relative to each layer; `layers` indexes the model's layer list."""

    layers: tuple[int, ...]
    modules: tuple[ModuleSharding, ...]


class ExpertSharding(_Model):
    """How a module of experts runs in equal layers: its path relative to each layer, or in the model where `layers` is empty.

    Over ep a rank keeps experts / ep of them. `params`: state of each parameter over etp. `sizes`: attributes to set to their local
    value. `listed`: the path in the module of a list of experts; `params` are then names in one of them.
    """

    layers: tuple[int, ...]
    module: str
    experts: Count
    params: dict[str, str]
    sizes: dict[str, int] = {}
    listed: str | None = None


class PlannedKernel(_Model):
    """A kernel that takes the place of eager code (codegen/kernels/choose.py): `modules` are full paths, "" the loss; seconds and bytes are
    of one microbatch in one of them, forward and backward, on one rank. `region` says what is computed and where it goes in."""

    name: str
    kind: Literal["generated", "vocab_parallel_cross_entropy"] = "generated"
    modules: tuple[str, ...]
    formula: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    dtype: str
    save: Literal["inputs", "statistics", "all"] = "inputs"
    saved_bytes: dict[str, int] = {}
    saved_change_bytes: int = 0
    eager_s: Seconds
    fused_s: Seconds
    eager_bytes: int
    fused_bytes: int
    region: dict[str, Any] | None = None


class StageProgram(_Model):
    """The model's code around its layers, for this layout: sizes are local, conversions are statements ("convert:P>S1")."""

    inputs: tuple[str, ...]
    stem: tuple[Statement, ...]
    side: tuple[Statement, ...]
    layers: tuple[str, ...]
    layer_args: tuple[Any, ...]
    layer_kwargs: dict[str, Any]
    head: tuple[Statement, ...]
    output: str


class Solution(_Model):
    """What to run. `rank_map`: the device of each rank, where they are not numbered alike."""

    layout: Layout
    stages: tuple[Stage, ...]
    mesh: dict[str, int]
    layer_shardings: tuple[LayerSharding, ...] = ()
    module_shardings: tuple[ModuleSharding, ...] = ()
    loss: Literal["plain", "chunked", "vocab_parallel"] = "plain"
    experts: tuple[ExpertSharding, ...] = ()
    program: StageProgram | None = None
    kernels: tuple[PlannedKernel, ...] = ()
    kv_replicated: bool = False
    rank_map: tuple[int, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _stages_recompute_as_the_layout(cls, data: Any) -> Any:
        """Plans that know no recompute by stage say it in their layout alone."""
        if isinstance(data, dict) and isinstance(data.get("stages"), list) and isinstance(data.get("layout"), dict):
            whole = data["layout"].get("recompute", "none")
            data = {**data, "stages": [{"recompute": whole, **s} if isinstance(s, dict) else s for s in data["stages"]]}
        return data


class ModelRef(_Model):
    """The model that was planned, and what its code needs to be built and fed."""

    name: str
    source: str
    origin: Literal["hf", "module"]
    sample_source: str = ""
    hash: str
    numel: Count
    layers: Annotated[int, Field(ge=0)]
    layer_paths: tuple[str, ...] = ()
    objective: Literal["cross_entropy", "mse", "square", "custom"]
    labels_from: Literal["shift", "random", "sample", "none"]
    inputs: tuple[ModelInput, ...]
    labels: ModelInput | None = None
    tied: tuple[tuple[str, ...], ...] = ()
    config: dict[str, Any] | None = None


class Range(_Model):
    """A prediction: median, and what nine of ten should lie between."""

    p05: float
    p50: float
    p95: float


class Memory(_Model):
    """Bytes of the fullest rank, as its driver sees them. `by_kind` adds up to `peak.p50`, `reserved` in it being what the allocator, the
    communicators and the context take beyond live tensors; `by_metric` has what torch calls allocated and reserved, and the device's
    own figure; `limit` is what the plan was allowed."""

    capacity: Bytes
    limit: Bytes
    peak: Range
    by_kind: dict[str, float]
    by_metric: dict[str, Range] = {}
    peak_stage: int
    peak_event: str


class Prediction(_Model):
    """What the cost model expects. `time_s` adds up to `step_s.p50`; `simulated_step_s` is the event simulator's figure."""

    step_s: Range
    simulated_step_s: Seconds
    tokens_per_s: float
    mfu: float
    time_s: dict[str, float]
    memory_bytes: Memory
    provenance: tuple[str, ...] = ()


class Alternative(_Model):
    """Another layout that fits, in order of predicted step time."""

    layout: Layout
    step_s: Seconds
    peak_bytes: Bytes
    slower: float  # step_s over the best, minus one
    bottleneck: str


class WhyNot(_Model):
    """The best that was possible with one choice fixed: its price, or the constraint that forbids it, with its number."""

    fix: str
    fits: bool
    step_s: float | None = None
    slower: float | None = None
    reason: str


class Rejected(_Model):
    """Layouts that were not chosen, counted by the constraint that excluded them."""

    constraint: str
    count: Annotated[int, Field(ge=0)]
    example: str = ""


class Certificate(_Model):
    """The proof: every layout of the space was evaluated, or its bound was above the best, or it does not fit.

    `space` = `pruned_by_memory` + `pruned_by_bound` + `evaluated` + `open`; `priced` of them went through the cost model's arrays, the
    others lie under a bound that holds for all of their kind. `infeasible`: of the evaluated, those without a cut that fits and beats the
    best. `bound_s` is a lower bound on the step (or on the price, for other
    objectives) of every layout that fits; `gap` = best / bound - 1, above 0 only where the time ran out with layouts `open`.
    """

    status: Literal["optimal", "infeasible", "time limit"]
    gap: Annotated[float, Field(ge=0)]
    bound_s: Seconds
    seconds: Seconds
    space: int
    pruned_by_memory: int
    pruned_by_bound: int
    evaluated: int
    infeasible: int
    priced: int = 0
    open: int = 0


class CreatedBy(_Model):
    version: str
    torch: str


class Plan(_Model):
    """One JSON document: the layout and all that runs it, the prediction and all that argues for it."""

    schema_: Literal["meshwright.plan/1"] = Field(SCHEMA, alias="schema")
    created_by: CreatedBy
    inputs_hash: str
    model: ModelRef
    cluster: Cluster
    workload: Workload
    objective: Literal["throughput", "gpus", "cost", "memory"] = "throughput"
    solution: Solution
    prediction: Prediction
    alternatives: tuple[Alternative, ...] = ()
    why_not: tuple[WhyNot, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    solver: Certificate
    coverage: Coverage
    notes: tuple[str, ...] = ()

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @property
    def layout(self) -> Layout:
        return self.solution.layout

    @property
    def microbatches(self) -> int:
        """Microbatches of one step on one data-parallel rank."""
        return self.workload.global_batch // (self.layout.dp * self.layout.micro_batch)

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True, indent=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Writes the plan beside `path`, then renames: a reader never sees half a plan."""
        write_atomically(Path(path), self.to_json())

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> Plan:
        """Reads and verifies a plan. InputError says where it is broken."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as e:
            raise InputError(f"{where} is not JSON: {e}") from None
        except (ValueError, RecursionError) as e:  # a number of thousands of digits, values nested too deep
            raise InputError(f"{where} is not JSON that can be read: {type(e).__name__}") from None
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise InputError(f"{where} is not a plan of schema {SCHEMA!r} (found {found!r})")
        try:
            plan = cls.model_validate(data)
        except ValidationError as e:
            raise InputError(f"{where}: {first_error(e)}") from None
        broken = plan.verify()
        if broken:
            raise InputError(f"{where} is inconsistent: {broken[0]}")
        return plan

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        path = Path(path)
        if not path.exists():
            raise InputError(f"plan {path} does not exist")
        try:
            return cls.from_json(path.read_text(), str(path))
        except UnicodeDecodeError:
            raise InputError(f"plan {path} is not text") from None
        except OSError as e:
            raise InputError(f"plan {path} cannot be read: {e.strerror}") from None

    def verify(self) -> list[str]:
        """What contradicts itself, each as "where: what"; empty for a sound plan."""
        return [*_verify_layout(self), *_verify_stages(self), *_verify_sharding(self), *_verify_prediction(self)]


def json_schema() -> dict[str, Any]:
    """The JSON schema of a plan."""
    return Plan.model_json_schema(by_alias=True)


def mesh_of(x: Layout) -> dict[str, int]:
    """Dimensions of the device mesh, outermost first; cp where there is one. Experts fold ep and etp into the dimensions of a stage."""
    return {"pp": x.pp, "replicate": x.replicate, "shard": x.shard, **({"cp": x.cp} if x.cp > 1 else {}), "tp": x.tp}


# --- verify ----------------------------------------------------------------------------------------------------------


def _verify_layout(plan: Plan) -> list[str]:
    x, w = plan.layout, plan.workload
    out = []
    if x.devices != plan.cluster.size:
        cp = f" x cp {x.cp}" if x.cp > 1 else ""
        out.append(f"solution.layout: tp {x.tp}{cp} x pp {x.pp} x dp {x.dp} is {x.devices} devices, the cluster has {plan.cluster.size}")
    if w.global_batch % (x.dp * x.micro_batch):
        out.append(f"solution.layout: dp {x.dp} x micro_batch {x.micro_batch} does not divide the global batch {w.global_batch}")
    elif plan.microbatches < x.pp:
        out.append(f"solution.layout: {plan.microbatches} microbatches are fewer than pp {x.pp} stages, and a schedule needs as many")
    if x.sp and x.tp == 1:
        out.append("solution.layout.sp: sequence parallelism needs tp > 1")
    if x.zero and x.dp * x.cp == 1:
        out.append(f"solution.layout.zero: ZeRO {x.zero} needs dp > 1")
    if x.zero == 0 and x.replicas > 1 or x.dp % x.replicas:
        out.append(f"solution.layout.replicas: {x.replicas} copies need ZeRO 1 to 3 and must divide dp {x.dp}")
    if x.tp * x.cp * x.dp % (x.ep * x.etp):
        out.append(f"solution.layout.ep: ep {x.ep} x etp {x.etp} does not divide the {x.tp * x.cp * x.dp} devices of a stage")
    mesh = mesh_of(x)
    if plan.solution.mesh != mesh:
        out.append(f"solution.mesh: {plan.solution.mesh} is not the layout's {mesh}")
    return out


def _verify_stages(plan: Plan) -> list[str]:
    x, stages, layers = plan.layout, plan.solution.stages, plan.model.layers
    out = []
    if len(stages) != x.pp:
        out.append(f"solution.stages: {len(stages)} stages for pp {x.pp}")
    at = 0
    spans = sorted((span, i) for i, s in enumerate(stages) for span in (s.chunks or (s.layers,)))
    for i, s in enumerate(stages):
        if len(s.chunks or (s.layers,)) != x.vpp or (s.chunks and s.chunks[0] != s.layers):
            out.append(f"solution.stages[{i}].chunks: {len(s.chunks)} chunks for vpp {x.vpp}")
        if s.recompute_layers is not None and s.recompute_layers > sum(b - a for a, b in s.chunks or (s.layers,)):
            out.append(f"solution.stages[{i}].recompute_layers: {s.recompute_layers} are more than its layers")
        if x.recompute != "by stage" and (s.recompute != x.recompute or s.recompute_layers is not None):
            out.append(f"solution.stages[{i}].recompute: {s.recompute} is not the layout's {x.recompute}")
    for span, i in spans:
        if span[0] != at or span[1] < span[0] or (span[1] == span[0] and layers):
            out.append(f"solution.stages[{i}].layers: {list(span)} does not follow layer {at}")
            break
        at = span[1]
    else:
        if at != layers:
            out.append(f"solution.stages: they hold {at} of {layers} layers")
    program = plan.solution.program
    if len(plan.model.layer_paths) != layers:
        out.append(f"model.layer_paths: {len(plan.model.layer_paths)} paths for {layers} layers")
    if x.pp > 1 and program is None:
        out.append("solution.program: a pipeline needs one")
    if program is not None:
        if len(program.layers) != layers:
            out.append(f"solution.program.layers: {len(program.layers)} of {layers} layers")
        out += _verify_program(program)
    return out


def _verify_program(program: StageProgram) -> list[str]:
    """Every value is made before it is read."""
    out = []
    known = set(program.inputs)
    for part in ("stem", "side", "head"):
        for i, s in enumerate(getattr(program, part)):
            missing = sorted(_refs((s.args, s.kwargs)) - known - {"h"})
            if missing:
                out.append(f"solution.program.{part}[{i}]: {missing[0]!r} is read before it is made")
            if s.target.partition(":")[0] not in ("module", "aten", "get", "convert", "context"):
                out.append(f"solution.program.{part}[{i}].target: {s.target!r} is no module, torch function, conversion or part of the context")
            known |= set(s.outputs)
    missing = sorted(_refs((program.layer_args, program.layer_kwargs)) - known - {"h"})
    if missing:
        out.append(f"solution.program.layer_kwargs: {missing[0]!r} is read before it is made")
    if program.output not in known | {"h"}:
        out.append(f"solution.program.output: {program.output!r} is never made")
    return out


def _refs(x: Any) -> set[str]:
    if isinstance(x, dict):
        if set(x) == {"ref"}:
            return {x["ref"]}
        return set().union(*(_refs(v) for v in x.values())) if x else set()
    if isinstance(x, list | tuple):
        return set().union(*(_refs(v) for v in x)) if x else set()
    return set()


def _verify_sharding(plan: Plan) -> list[str]:
    x, s = plan.layout, plan.solution
    out = []
    if x.tp == 1 and (s.layer_shardings or s.module_shardings or s.loss == "vocab_parallel"):
        out.append("solution.module_shardings: there is nothing to shard with tp 1")
    if x.tp > 1 and s.layer_shardings:
        held = Counter(i for group in s.layer_shardings for i in group.layers)
        wrong = [i for i in range(plan.model.layers) if held[i] != 1]
        if wrong:
            out.append(f"solution.layer_shardings: layer {wrong[0]} appears {held[wrong[0]]} times")
    groups = [(f"solution.layer_shardings[{i}].modules", g.modules) for i, g in enumerate(s.layer_shardings)]
    for where, modules in [*groups, ("solution.module_shardings", s.module_shardings)]:
        for j, m in enumerate(modules):
            for name, state in m.params.items():
                if not _is_state(state):
                    out.append(f"{where}[{j}].params.{name}: {state!r} is not a placement state")
            for key, conversion in [*m.inputs.items(), *m.outputs.items()]:
                if not _is_conversion(conversion):
                    out.append(f"{where}[{j}]: {conversion!r} at {key!r} is not a conversion between placement states")
    return out


def _is_state(text: str) -> bool:
    try:
        return str(parse(text)) == text
    except (KeyError, ValueError):
        return False


def _is_conversion(text: str) -> bool:
    source, arrow, target = text.partition(">")
    return bool(arrow) and _is_state(source) and _is_state(target) and (source[0], target[0]) in CONVERSIONS


def _verify_prediction(plan: Plan) -> list[str]:
    p, m = plan.prediction, plan.prediction.memory_bytes
    out = []
    for where, r in (("prediction.step_s", p.step_s), ("prediction.memory_bytes.peak", m.peak)):
        if not 0 < r.p05 <= r.p50 <= r.p95:
            out.append(f"{where}: p05 {r.p05:g}, p50 {r.p50:g}, p95 {r.p95:g} are not in order")
    for where, parts, total in (
        ("prediction.time_s", p.time_s, p.step_s.p50),
        ("prediction.memory_bytes.by_kind", m.by_kind, m.peak.p50),
    ):
        if not abs(sum(parts.values()) - total) <= 1e-6 * total:  # nor is what is no number
            out.append(f"{where}: its parts add up to {sum(parts.values()):g}, not {total:g}")
    if not 0 <= m.peak_stage < plan.layout.pp:
        out.append(f"prediction.memory_bytes.peak_stage: there is no stage {m.peak_stage} of {plan.layout.pp}")
    if not m.peak.p95 <= m.limit:
        out.append(f"prediction.memory_bytes: peak {m.peak.p95:g} (p95) is over the limit {m.limit:g}")
    if not m.limit <= m.capacity:
        out.append(f"prediction.memory_bytes.limit: {m.limit:g} is over the capacity {m.capacity:g}")
    s = plan.solver
    if s.space != s.pruned_by_memory + s.pruned_by_bound + s.evaluated + s.open:
        counted = f"{s.pruned_by_memory} + {s.pruned_by_bound} + {s.evaluated} + {s.open}"
        out.append(f"solver: {counted} layouts are not the {s.space} of the space")
    if plan.alternatives and plan.alternatives[0].layout != plan.layout:
        out.append("alternatives[0].layout: the first alternative is the solution")
    return out
