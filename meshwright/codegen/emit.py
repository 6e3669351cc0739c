"""emit: a Plan to a folder with a script that a person would have written, the runtime pieces it imports, and its launcher."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from textwrap import indent
from typing import Any

import jinja2

from meshwright.codegen.apply import OPTIMIZERS, SCHEDULES, modules_of, packed_parameters, split_ties
from meshwright.codegen.text import ProgramText, as_range, attribute, call, identifier, layer_list, literal, table, wrapped
from meshwright.planner.plan import Plan
from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import Statement
from meshwright.version import __version__

GIB = 2**30
LONGEST = 200  # lines of train.py
DIMS = '("pp", "replicate", "shard", "tp")'


def emit(plan: Plan, folder: str | Path) -> list[Path]:
    """Writes train.py, runtime/, launch.sh, plan.json and what the model needs into `folder`; returns the files written.

    The folder appears whole or not at all; an existing one is replaced only if an earlier emit wrote it. Raises InputError if
    the plan's model cannot be written as code.
    """
    plan.check_runs()
    folder = Path(folder)
    parent = folder.absolute().parent
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "plan.json").exists())):
        raise InputError(f"{folder} exists and was not written by emit: name a new folder")
    if not parent.is_dir():
        raise InputError(f"the folder {parent} does not exist")
    scratch = Path(tempfile.mkdtemp(dir=parent, prefix=f".{folder.name}"))
    try:
        scratch.chmod(0o755)
        for name, text in scripts(plan).items():
            (scratch / name).write_text(text)
        (scratch / "launch.sh").write_text(launcher(plan))
        (scratch / "launch.sh").chmod(0o755)
        (scratch / "plan.json").write_text(plan.to_json())
        _write_runtime(scratch / "runtime")
        _write_model(plan, scratch)
        if folder.exists():
            shutil.rmtree(folder)
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _write_runtime(folder: Path) -> None:
    folder.mkdir()
    for item in (files("meshwright.codegen") / "runtime").iterdir():
        if item.name.endswith(".py"):
            (folder / item.name).write_text(item.read_text())


def _write_model(plan: Plan, folder: Path) -> None:
    if plan.model.origin == "hf":
        (folder / "config.json").write_text(json.dumps(plan.model.config, indent=2) + "\n")
        return
    where = plan.model.source.rpartition(":")[0]
    if where.endswith(".py"):
        if not Path(where).exists():
            raise InputError(f"{where}, which the plan names, does not exist: emit from where the plan was made")
        shutil.copy(where, folder / f"{_module_name(where)}.py")


def _module_name(where: str) -> str:
    """The name under which a user's module is imported; a file that would hide one of ours is copied under another."""
    if not where.endswith(".py"):
        return where
    stem = Path(where).stem
    return f"user_{stem}" if stem in ("train", "runtime", "tables") else stem


def scripts(plan: Plan) -> dict[str, str]:
    """The text of train.py; of tables.py too, with the sharding tables, where one file would be longer than a person reads."""
    writer = _Writer(plan)
    context = writer.context()
    whole = _tidy(_template("train.py.jinja").render(**context))
    if len(whole.splitlines()) < LONGEST or not context["tables"]:
        return {"train.py": whole}
    names = [line.partition(" ")[0] for line in context["tables"].splitlines() if " = {" in line]
    used = sorted(n for n in names if n in ("LAYER", "LAYER_TABLES", "OUTSIDE"))
    imports = [i.replace("import Local, convert", "import convert") for i in context["own_imports"] if not i.endswith("import Local")]
    short = {**context, "tables": "", "own_imports": sorted([*imports, f"from tables import {', '.join(used)}"])}
    apart = _template("tables.py.jinja").render(tables=context["tables"])
    return {"train.py": _tidy(_template("train.py.jinja").render(**short)), "tables.py": _tidy(apart)}


def launcher(plan: Plan) -> str:
    """The text of launch.sh: torchrun on one node or several."""
    nodes = len(set(plan.cluster.node_of.tolist()))
    devices = plan.layout.devices
    if devices % nodes:
        raise InputError("launch.sh needs nodes with equal numbers of devices")
    return _template("launch.sh.jinja").render(nodes=nodes, per_node=devices // nodes, devices=devices)


def _template(name: str) -> jinja2.Template:
    text = (files("meshwright.codegen") / "templates" / name).read_text()
    return jinja2.Template(text, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)


def _tidy(text: str) -> str:
    """No trailing blanks, and at most two empty lines in a row."""
    out: list[str] = []
    for line in text.splitlines():
        if line.strip() or out[-2:] != ["", ""]:
            out.append(line.rstrip())
    return "\n".join(out).rstrip() + "\n"


class _Writer:
    """The parts of train.py that depend on the plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.x, self.program = plan, plan.layout, plan.solution.program
        self.fsdp = self.x.dp > 1 or plan.workload.precision == "bf16"
        self.recomputes = any(st.recompute != "none" for st in plan.solution.stages)
        self.hf = plan.model.origin == "hf"
        self.schedule = SCHEDULES[self.x.schedule].__name__
        self.ties = split_ties(plan) if self.x.pp > 1 else []
        parts = (*self.program.stem, *self.program.side, *self.program.head) if self.program else ()
        self.converts = any(s.target.startswith("convert:") for s in parts)
        if plan.solution.loss == "vocab_parallel":
            self.loss, self.loss_args = "vocab_parallel_cross_entropy", 'output, labels, self.mesh["tp"]'
        else:
            self.loss, self.loss_args = "loss" if plan.model.objective == "custom" else plan.model.objective, "output, labels"

    def context(self) -> dict[str, Any]:
        p, x, m, program = self.plan, self.x, self.plan.model, self.program
        text = ProgramText(program, piped=x.pp > 1) if program else None
        optimizer, options = OPTIMIZERS[p.workload.optimizer]
        doc = "Layers [first, last), with the code before and after them on the first and last stage."
        return {
            "title": wrapped(f"Trains {m.name} ({m.numel:,} parameters) on {x.devices} x {p.cluster.device.name}: {x}."),
            "summary": self._summary(), "version": __version__, "fsdp": self.fsdp, "bf16": p.workload.precision == "bf16",
            "pp": x.pp, "tp": x.tp, "replicate": x.replicate, "shard": x.shard, "zero": x.zero, "hf": self.hf,
            "hf_class": self._hf_class(), "own_imports": self._own_imports(), "converts": self.converts,
            "global_batch": p.workload.global_batch, "micro_batch": x.micro_batch, "seq": p.workload.seq,
            "step_s": f"{p.prediction.step_s.p50:.6g}", "peak_bytes": f"{p.prediction.memory_bytes.peak.p50:.4g}",
            "layers": layer_list(m.layer_paths) if m.layers else "", "stages": literal([s.layers for s in p.solution.stages]),
            "recompute": literal([(s.recompute, s.layers[1] - s.layers[0] if s.recompute_layers is None else s.recompute_layers)
                                  for s in p.solution.stages]) if x.recompute == "by stage" else "",
            "tied": literal(self.ties) if self.ties else "", "tables": self._tables() if x.tp > 1 else "", "program": program is not None,
            "n_layers": m.layers, "stage_doc": doc if x.pp > 1 else "The model, returning the tensor that the loss reads.",
            "stem_modules": literal(self._only(program.stem)) if program else "",
            "head_modules": literal(self._only(program.head)) if program else "",
            "inputs": text.signature if text else ", ".join(f"{identifier(i.name)}: Tensor" for i in m.inputs),
            "forward": indent("\n".join(text.lines() if text else self._whole_forward()), " " * 8),
            "parallelize": indent("\n".join(self._parallelize()), " " * 4), "data": "\n".join(self._data()),
            "steps": "\n".join(self._trainer()), "schedule": self.schedule, "optimizer": optimizer,
            "optimizer_options": ", ".join(f"{k}={v}" for k, v in {"foreach": False, **options}.items() if k != "fused"), "fused": "fused" in options,
        }  # fmt: skip

    def _summary(self) -> str:
        p = self.plan.prediction
        peak, step = p.memory_bytes.peak, p.step_s
        parts = sorted(p.time_s.items(), key=lambda x: -x[1])
        spent = ", ".join(f"{k.replace('_', ' ')} {v / step.p50:.0%}" for k, v in parts if v >= 0.01 * step.p50)
        return wrapped(
            f"Predicted: {step.p50:.3g} s a step ({step.p05:.3g} to {step.p95:.3g}), of which {spent}; peak {peak.p50 / GIB:.3g} GiB of "
            f"{p.memory_bytes.capacity / GIB:.3g} (p95 {peak.p95 / GIB:.3g}), in the {p.memory_bytes.peak_event}."
        )

    def _hf_class(self) -> str:
        names = (self.plan.model.config or {}).get("architectures") or []
        if self.hf and not names:
            raise InputError(f"{self.plan.model.source} has no 'architectures': add it, so that the script can name its class")
        return names[0] if names else ""

    def _own_imports(self) -> list[str]:
        m, x = self.plan.model, self.x
        lines = []
        if not self.hf:
            where, _, build = m.source.rpartition(":")
            home, _, sample = m.sample_source.rpartition(":")
            if home != where:
                raise InputError(f"emit needs {m.sample_source} in the same file as {m.source}")
            names = [build if build == "build" else f"{build} as build", sample if sample == "sample" else f"{sample} as sample"]
            lines.append(f"from {_module_name(where)} import {', '.join(sorted([*names, *(['loss'] if self.loss == 'loss' else [])]))}")
        if self.loss != "loss":
            lines.append(f"from runtime.loss import {self.loss}")
        names = ["mean_over_ranks"]
        if x.pp > 1:
            names += ["leave_out"]
            names += ["PerMicrobatch", "reshard"] if self.fsdp and x.zero >= 2 else []
            names += ["add_tied_gradients", "first_last_pair"] if self.ties else []
        lines.append("from runtime.launch import start")
        lines.append(f"from runtime.pipeline import {', '.join(sorted(names, key=lambda n: (n.islower(), n)))}")
        if self.recomputes:
            lines.append("from runtime.recompute import recompute")
        if x.tp > 1:
            lines.append(f"from runtime.tensor_parallel import Local{', convert' if self.converts else ''}")
        if self.hf:
            lines.append("from runtime.weights import allocate, blank, fill")
        return lines

    def _tables(self) -> str:
        s = self.plan.solution
        groups = s.layer_shardings
        out: list[str] = []
        if len(groups) == 1:
            out += table("LAYER", groups[0].modules)
        elif groups:
            common = [m for m in groups[0].modules if all(m in g.modules for g in groups)]
            out += table("EVERY_LAYER", common)
            for i, g in enumerate(groups):
                out += table(f"LAYER_{i}", [m for m in g.modules if m not in common], "EVERY_LAYER")
            rows = [f"**dict.fromkeys({as_range(g.layers)}, LAYER_{i})" for i, g in enumerate(groups)]
            out.append(f"LAYER_TABLES = {{{', '.join(rows)}}}")
        return "\n".join([*out, *table("OUTSIDE", s.module_shardings)])

    # -- the stage

    def _only(self, part: Sequence[Statement]) -> list[str]:
        """Modules that a part of the program calls and that no other stage needs."""
        assert self.program is not None
        kept = modules_of(self.program.side)
        return [m for m in modules_of(part) if m not in kept]

    def _whole_forward(self) -> list[str]:
        args = [identifier(i.name) if _positional(i.name) else f"{i.name}={identifier(i.name)}" for i in self.plan.model.inputs]
        result = "out.logits" if self.hf else "out[0] if isinstance(out, tuple) else out"
        return [*call("out = self.model", args, 8), f"return {result}"]

    # -- parallelize

    def _parallelize(self) -> list[str]:
        x, m = self.x, self.plan.model
        span = "[first:last]" if x.pp > 1 else ""
        lines: list[str] = []
        if self.hf:
            lines += [
                'config = AutoConfig.from_pretrained(HERE / "config.json", use_cache=False)', 'with torch.device("meta"):',
                f"    model = {self._hf_class()}(config).float().train()  # no rank ever holds the whole model", "template = blank(model)",
            ]  # fmt: skip
        else:
            lines += ["torch.manual_seed(seed)", "model = build().train()"]
        lines += ['first, last = STAGES[mesh["pp"].get_local_rank()]'] if x.pp > 1 else []
        args = ["model", *(["first", "last"] if x.pp > 1 else []), *(['mesh["tp"]'] if self.converts else [])]
        lines.append(f"stage = Stage({', '.join(args)})")
        if m.layers and (x.tp > 1 or self.recomputes or self.fsdp):
            lines.append(f"layers = [model.get_submodule(path) for path in LAYERS{span}]")
        lines += self._tensor_parallel() if x.tp > 1 else []
        lines += self._recompute_and_shard()
        return [*lines, *(self._weights(span) if self.hf else []), "return stage" if self.hf else "return stage.to(device)"]

    def _tensor_parallel(self) -> list[str]:
        groups = self.plan.solution.layer_shardings
        lines = []
        if groups:
            several = len(groups) > 1
            start = ", first" if self.x.pp > 1 else ""
            lines.append(f"for i, layer in enumerate(layers{start}):" if several else "for layer in layers:")
            lines += [
                f"    for path, style in {'LAYER_TABLES[i]' if several else 'LAYER'}.items():",
                '        parallelize_module(layer.get_submodule(path), mesh["tp"], style)',
            ]
        if self.x.pp > 1:
            lines += [
                "held = dict(model.named_modules())", "for path, style in OUTSIDE.items():",
                "    if not isinstance(held.get(path, nn.Identity()), nn.Identity):  # else another stage has it",
                '        parallelize_module(held[path], mesh["tp"], style)',
            ]  # fmt: skip
        else:
            lines += ["for path, style in OUTSIDE.items():", '    parallelize_module(model.get_submodule(path), mesh["tp"], style)']
        known = {f"{m.module}.{n}" for m in self.plan.solution.module_shardings for n in m.params}
        for group in self.plan.model.tied:
            if group in self.ties:
                continue
            used = next((n for n in group if n in known), group[0])
            ties = [f"model.{attribute(o)} = model.{attribute(used)}  # tied" for o in group if o != used]
            if self.x.pp > 1:  # the whole group is on one stage
                first = any(n.startswith(m + ".") for n in group for m in self._only(self.program.stem)) if self.program else True
                ties = [f"if stage.is_{'first' if first else 'last'}:", *(f"    {line}" for line in ties)]
            lines += ties
        return lines

    def _recompute_and_shard(self) -> list[str]:
        x = self.x
        mesh = 'mesh["replicate", "shard"]' if x.zero == 0 else 'mesh["shard"]'
        bf16 = self.plan.workload.precision == "bf16"
        policy = ", mp_policy=policy" if bf16 else ""
        lines = ["policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)"] if bf16 else []
        each = [f'    recompute(layer, "{x.recompute}")'] if self.recomputes and x.recompute != "by stage" else []
        loop = "for layer in layers:"
        if x.recompute == "by stage":
            which = 'mesh["pp"].get_local_rank()' if x.pp > 1 else "0"
            lines.append(f"mode, covered = RECOMPUTE[{which}]")
            each, loop = ['    recompute(layer, mode if i < covered else "none")'], "for i, layer in enumerate(layers):"
        if self.fsdp:
            note = "  # gathered again for backward" if x.zero == 3 else ""
            each.append(f"    fully_shard(layer, mesh={mesh}, reshard_after_forward={x.zero == 3}{policy}){note}")
        lines += [loop, *each] if each and self.plan.model.layers else []
        return lines + ([f"fully_shard(stage, mesh={mesh}, reshard_after_forward=False{policy})"] if self.fsdp else [])

    def _weights(self, span: str) -> list[str]:
        """Lines that fill the parameters layer by layer, and the modules outside the layers one by one."""
        program, m = self.program, self.plan.model
        lines = ["allocate(stage, device)"]
        outside = [""]
        if program is not None:
            outside = list(dict.fromkeys(modules_of((*program.stem, *program.side, *program.head))))
        units = f"LAYERS{span} + " if m.layers and program else ""
        if self.x.pp > 1 and program is not None:
            stem, head = self._only(program.stem), self._only(program.head)
            lines += [
                f"units = {units}{literal([u for u in outside if u not in (*stem, *head)])}",
                f"units += {literal(stem)} if stage.is_first else []",
                f"units += {literal(head)} if stage.is_last else []",
            ]
        else:
            lines.append(f"units = {units}{literal(outside)}")
        packed = self._packed(span)
        lines += packed
        seeds: dict[str, str] = {}
        for group in m.tied:
            owners = [n.rpartition(".")[0] for n in group]
            seeds |= {o: owners[0] for o in owners[1:] if o in outside}
        args = ["stage.model", "template", "units", "template._init_weights", "seed", "device"]
        args += ["packed=packed"] if packed else []
        args += [f"seeds={literal(seeds)}"] if seeds else []
        return [*lines, *call("fill", args, 4)]

    def _packed(self, span: str) -> list[str]:
        """Lines that name the packed parameters, folded over equal layers."""
        inside: dict[str, tuple[int, int]] = {}
        outside: dict[str, tuple[int, int]] = {}
        for name, how in packed_parameters(self.plan).items():
            layer = next((p for p in self.plan.model.layer_paths if name.startswith(p + ".")), "")
            (inside if layer else outside)[name.removeprefix(layer + ".")] = how
        lines = []
        if inside:
            lines = [
                f"several = {literal(inside)}  # dimension and number of pieces of packed weights",
                f'packed = {{f"{{path}}.{{n}}": how for path in LAYERS{span} for n, how in several.items()}}',
            ]
        if outside:
            lines.append(f"packed {'|' if inside else ''}= {literal(outside)}")
        return lines

    # -- data and steps

    def _data(self) -> list[str]:
        m = self.plan.model
        if self.hf:
            rows = ["g = torch.Generator().manual_seed((seed * 1_000_003 + step) * 1_000_003 + index)", *self._random_row()]
        else:
            labels = {"sample": 'made["labels"]', "shift": "inputs[0].roll(-1, 1)"}.get(m.labels_from, "torch.zeros(1)")
            positional = all(_positional(i.name) for i in m.inputs)
            inputs = (
                "[made] if isinstance(made, Tensor) else list(made)" if positional else f"[made[k] for k in {literal([i.name for i in m.inputs])}]"
            )
            rows = [
                "torch.manual_seed((seed * 1_000_003 + step) * 1_000_003 + index)", "made = sample(1, SEQ)", f"inputs = {inputs}",
                f"rows.append((*inputs, {labels}))",
            ]  # fmt: skip
        return [
            "def batch(step: int, seed: int, first: int, count: int) -> tuple[list[Tensor], Tensor]:",
            '    """Samples [first, first + count) of a step, each from its own seed: the same data in any layout."""',
            "    rows = []", "    for index in range(first, first + count):", *(f"        {line}" for line in rows),
            "    *inputs, labels = (torch.cat(column) for column in zip(*rows, strict=True))", "    return inputs, labels",
        ]  # fmt: skip

    def _random_row(self) -> list[str]:
        m = self.plan.model
        if m.labels_from == "shift":
            return [f"tokens = torch.randint(0, {m.inputs[0].high}, (1, SEQ + 1), generator=g)", "rows.append((tokens[:, :-1], tokens[:, 1:]))"]
        assert m.labels is not None
        columns = [
            f"torch.randint(0, {i.high}, {i.spec.shape}, generator=g)" if i.high else f"torch.randn({i.spec.shape}, generator=g)"
            for i in (*m.inputs, m.labels)
        ]
        return call("rows.append", [f"({', '.join(columns)})"], 8)

    def _trainer(self) -> list[str]:
        x = self.x
        managed = self.fsdp and x.pp > 1 and x.zero >= 2
        start = [
            f"names = {DIMS}",
            "self.mesh = init_device_mesh(device.type, (PP, REPLICATE, SHARD, TP), mesh_dim_names=names)",
            "self.stage, self.device, self.seed = parallelize(self.mesh, device, seed), device, seed",
            'self.rank = self.mesh["replicate"].get_local_rank() * SHARD + self.mesh["shard"].get_local_rank()',
        ]
        if x.pp > 1:
            start += [f"self.stage.set_reshard_after_backward({x.zero == 3})"] if managed else []
            start += [
                f'stage, pp = {"PerMicrobatch(self.stage)" if managed else "self.stage"}, self.mesh["pp"]',
                "held = PipelineStage(stage, pp.get_local_rank(), PP, device, group=pp.get_group())",
                f"self.schedule = {self.schedule}(held, MICROBATCHES, loss_fn=self.loss, scale_grads=False)",
            ]
            start += ["self.pair = first_last_pair(self.mesh)"] if self.ties else []
        step = [
            "count = GLOBAL_BATCH // (REPLICATE * SHARD)",
            "inputs, labels = batch(step, self.seed, self.rank * count, count)",
            "inputs, labels = [x.to(self.device) for x in inputs], labels.to(self.device)",
            *(self._pipelined(managed) if x.pp > 1 else self._accumulated()),
        ]
        return [
            "class Trainer:", '    """This rank\'s stage, and how one step of it runs."""', "",
            "    def __init__(self, device: torch.device, seed: int) -> None:", *(f"        {line}" for line in start), "",
            "    def loss(self, output: Tensor, labels: Tensor) -> Tensor:", f"        return {self.loss}({self.loss_args}) / MICROBATCHES", "",
            "    def step(self, step: int) -> Tensor:", '        """Forward and backward of one step; the mean loss of the global batch."""',
            *(f"        {line}" for line in [*step, "return mean_over_ranks(total, self.mesh)"]),
        ]  # fmt: skip

    def _accumulated(self) -> list[str]:
        x = self.x
        lines = ["total = torch.zeros((), device=self.device)"]
        columns = "zip(*(x.chunk(MICROBATCHES) for x in (*inputs, labels)), strict=True)"
        lines.append(f"for i, (*inputs, labels) in enumerate({columns}):" if self.fsdp else f"for *inputs, labels in {columns}:")
        if self.fsdp:
            lines.append("    last = i == MICROBATCHES - 1")
            lines += ["    self.stage.set_requires_gradient_sync(last)  # gradients are reduced once a step"] if x.zero < 2 else []
            lines += ["    self.stage.set_reshard_after_backward(last)  # parameters stay gathered through the step"] if x.zero < 3 else []
            lines.append("    self.stage.set_is_last_backward(last)")
        return [*lines, "    loss = self.loss(self.stage(*inputs), labels)", "    loss.backward()", "    total += loss.detach()"]

    def _pipelined(self, managed: bool) -> list[str]:
        lines = [
            "losses: list[Tensor] = []",
            "first = inputs if self.stage.is_first else []",
            'last = {"target": labels, "losses": losses} if self.stage.is_last else {}',
            "self.schedule.step(*first, return_outputs=False, **last)  # or it keeps every microbatch's output",
        ]
        lines += ["reshard(self.stage)"] if managed else []
        lines += ["add_tied_gradients(self.stage.model, TIED, self.pair)"] if self.ties else []
        return [*lines, "total = torch.stack(losses).sum().detach() if losses else torch.zeros((), device=self.device)"]


def _positional(name: str) -> bool:
    """Inputs without a name in the sample are numbered."""
    return name.startswith("input_") and name[6:].isdigit()
