"""The text of an emitted script: what of train.py depends on the plan."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from textwrap import indent
from typing import Any

import jinja2

from meshwright.codegen.apply import OPTIMIZERS, SCHEDULES, last_rank, packed_parameters, uses_fsdp, virtual_stage
from meshwright.codegen.kernels.emitted import files as kernel_files
from meshwright.codegen.kernels.planned import kernels_of
from meshwright.codegen.stage import modules_of, split_ties, tail_of
from meshwright.codegen.text import ProgramText, as_range, attribute, call, identifier, layer_list, literal, table, wrapped
from meshwright.costmodel.layouts import LOSS_CHUNKS, SPLIT
from meshwright.planner.plan import Plan
from meshwright.planner.token_dims import token_dim
from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import Statement
from meshwright.version import __version__

GIB = 2**30
LONGEST = 200  # lines of train.py
_TABLES = ("LAYER", "LAYER_TABLES", "OUTSIDE")


def scripts(plan: Plan) -> dict[str, str]:
    """The text of train.py; of tables.py too, with the sharding tables, where one file would be longer than a person reads."""
    context = _Writer(plan).context()
    whole = _tidy(_template("train.py.jinja").render(**context))
    if len(whole.splitlines()) < LONGEST or not context["tables"]:
        return {"train.py": whole}
    names = [line.partition(" ")[0] for line in context["tables"].splitlines() if " = {" in line]
    used = sorted(n for n in names if n in _TABLES)
    imports = [i.replace("import Local, convert", "import convert") for i in context["own_imports"] if not i.endswith("import Local")]
    short = {**context, "tables": "", "own_imports": sorted([*imports, f"from tables import {', '.join(used)}"])}
    apart = _template("tables.py.jinja").render(tables=context["tables"])
    return {"train.py": _tidy(_template("train.py.jinja").render(**short)), "tables.py": _tidy(apart)}


def module_name(where: str) -> str:
    """The name under which a user's module is imported; a file that would hide one of ours is copied under another."""
    if not where.endswith(".py"):
        return where
    stem = Path(where).stem
    return f"user_{stem}" if stem in ("train", "runtime", "tables", "kernels") else stem


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
        self.fsdp = uses_fsdp(plan)
        self.recomputes = any(st.recompute != "none" for st in plan.solution.stages)
        self.hf = plan.model.origin == "hf"
        self.ties = split_ties(plan) if self.x.pp > 1 else []
        self.experts, self.attends = plan.solution.experts, self.x.cp > 1 or plan.solution.kv_replicated
        parts = (*self.program.stem, *self.program.side, *self.program.head) if self.program else ()
        self.converts = any(s.target.startswith("convert:") for s in parts)
        self.slices = any(s.target.startswith("context:") for s in parts)
        self.tail = tail_of(self.program) if self.program and self.x.loss == "chunked" else ()
        self.splits = self.x.pp > 1 and self.x.schedule in SPLIT
        self.tokens = self.hf and plan.model.labels_from == "shift"
        kernels = kernel_files(kernels_of(plan))
        self.installs = any(n not in ("__init__.py", "vocab_parallel.py") for n in kernels)
        self.fused_loss = "vocab_parallel.py" in kernels
        self.streamed = self.x.offload != "none" or self.x.state_dtype != "fp32"

    def context(self) -> dict[str, Any]:
        p, x, m, program = self.plan, self.x, self.plan.model, self.program
        text = ProgramText(program, piped=x.pp > 1, cp_kind=x.cp_kind, tail=self.tail) if program else None
        spans = [s.chunks or (s.layers,) for s in p.solution.stages]
        doc = "Layers [first, last), with the code before and after them on the first and last stage."
        unshard = ["self.unshard()  # backward may come when the step has sharded it again"] if self.fsdp else []
        note = "first and last layer of each stage, the last not included" if x.vpp == 1 else "first and last layer of each rank's chunks"
        return {
            "title": wrapped(f"Trains {m.name} ({m.numel:,} parameters) on {x.devices} x {p.cluster.device.name}: {x}."),
            "summary": self._summary(), "version": __version__, "mp_policy": p.workload.precision == "bf16", "plain_fsdp": self.fsdp,
            "pp": x.pp, "vpp": x.vpp, "tp": x.tp, "cp": x.cp, "replicate": x.replicate, "shard": x.shard, "zero": x.zero, "ep": x.ep, "etp": x.etp,
            "hf": self.hf, "hf_class": self._hf_class(), "own_imports": self._own_imports(), "uses_mesh": self.converts or self.slices,
            "global_batch": p.workload.global_batch, "micro_batch": x.micro_batch, "seq": p.workload.seq, "tokens": self.tokens,
            "vocabulary": m.inputs[0].high,
            "step_s": f"{p.prediction.step_s.p50:.6g}", "peak_bytes": f"{p.prediction.memory_bytes.peak.p50:.4g}",
            "layers": layer_list(m.layer_paths) if m.layers else "", "stages_note": note,
            "stages": literal([list(s) for s in spans] if x.vpp > 1 else [s[0] for s in spans]),
            "places": literal([[virtual_stage(x, r, c) for c in range(x.vpp)] for r in range(x.pp)]),
            "recompute": literal([(s.recompute, sum(b - a for a, b in s.chunks or (s.layers,)) if s.recompute_layers is None else s.recompute_layers)
                                  for s in p.solution.stages]) if x.recompute == "by stage" else "",
            "tied": literal([list(g) for g in m.tied]) if m.tied else "", "order": literal(list(p.solution.rank_map)) if p.solution.rank_map else "",
            "packed": "\n".join(self._packed()), "tables": self._tables() if x.tp > 1 else "", "experts": self._expert_table(),
            "stage_doc": doc if x.pp > 1 else "The model, returning the tensor that the loss reads.",
            "stem_modules": literal(self._only(program.stem)) if program else "",
            "head_modules": literal(self._only(program.head)) if program else "",
            "inputs": text.signature if text else ", ".join(f"{identifier(i.name)}: Tensor" for i in m.inputs),
            "forward": indent("\n".join(text.lines() if text else self._whole_forward()), " " * 8),
            "project": indent("\n".join([*unshard, *text.project_lines()]), " " * 8) if text and self.tail else "",
            "project_from": text.hidden if text and self.tail else "",
            "parallelize": indent("\n".join(self._parallelize()), " " * 4), "data": "\n".join(self._data()),
            "start": indent("\n".join(self._start()), " " * 8), "step": indent("\n".join(self._step()), " " * 8), "loss": self._loss(),
            "schedule": SCHEDULES[x.schedule].__name__, "streamed": self.streamed, "optimizer": self._optimizer(),
            "shared": (", shared=held_twice(trainer.parts, TIED)" if self.ties else "") + (", apart=apart, ep=EP" if self._lists else ""),
            "lists": literal(self._lists) if self._lists else "",
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
        found: dict[str, list[str]] = {
            "checkpoint": ["load", "save"], "launch": ["start", "stopping_together"], "log": ["Log"], "mesh": ["Mesh"],
            "optimizer": ["Streamed" if self.streamed else "by_mesh", "clip_gradients"], "pipeline": ["mean_over_ranks"],
            "shards": ["named_tensors"], "steps": ["pipeline", "run_schedule"] if x.pp > 1 else ["accumulate"],
        }  # fmt: skip
        lines = []
        if not self.hf:
            where, _, build = m.source.rpartition(":")
            home, _, sample = m.sample_source.rpartition(":")
            if home != where:
                raise InputError(f"emit needs {m.sample_source} in the same file as {m.source}")
            names = [build if build == "build" else f"{build} as build", sample if sample == "sample" else f"{sample} as sample"]
            lines.append(f"from {module_name(where)} import {', '.join(sorted([*names, *(['loss'] if self._own_loss else [])]))}")
        else:
            found["weights"] = ["allocate", "blank", "fill"]
            found["hub"] = ["load_safetensors", "save_safetensors"]
        lines += ["from kernels import install"] if self.installs else []
        lines += ["from kernels.vocab_parallel import vocab_parallel_cross_entropy"] if self.fused_loss else []
        if not self._own_loss and not self.fused_loss:
            found["loss"] = [self._loss().partition("(")[0]]
        found["pipeline"] += ["leave_out"] if x.pp > 1 else []
        found["pipeline"] += ["add_tied_gradients", "first_last_pair", "held_twice"] if self.ties else []
        found["recompute"] = ["recompute"] if self.recomputes else []
        found["split_backward"] = ["split_backward"] if self.splits else []
        found["tensor_parallel"] = ["Local"] if x.tp > 1 else []
        found["tensor_parallel"] += ["convert"] if self.converts else []
        found["experts"] = ["place_experts", *(["fully_shard_layer"] if self.fsdp else [])] if self.experts else []
        found["context"] = ["attend"] if self.attends else []
        found["context"] += ["slice_tokens"] if x.cp > 1 else []
        found["data"] = ["TokenFile"] if self.tokens else []
        lines += [f"from runtime.{k} import {', '.join(sorted(v, key=lambda n: (n.islower(), n)))}" for k, v in sorted(found.items()) if v]
        return lines

    @property
    def _own_loss(self) -> bool:
        return self.plan.model.objective == "custom"

    def _loss(self) -> str:
        if self.plan.solution.loss == "vocab_parallel":
            return 'vocab_parallel_cross_entropy(output, labels, self.mesh["tp"])'
        if self.x.loss == "chunked":
            return f"chunked_cross_entropy(output, self.parts[-1].project, labels, {LOSS_CHUNKS})"
        return f"{'loss' if self._own_loss else self.plan.model.objective}(output, labels)"

    def _optimizer(self) -> str:
        name, options = OPTIMIZERS[self.plan.workload.optimizer]
        given = ["lr=args.lr", *(['fused=device.type == "cuda"'] if "fused" in options else [])]
        given += [f"{k}={v}" for k, v in {"foreach": False, **options}.items() if k != "fused"]
        if not self.streamed:
            return f"torch.optim.{name}(by_mesh(parameters), {', '.join(given)})"
        where = [*(["dtype=torch.bfloat16"] if self.x.state_dtype == "bf16" else []), *(['device="cpu"'] if self.x.offload != "none" else [])]
        return f"Streamed(functools.partial(torch.optim.{name}, {', '.join(given)}), parameters, {', '.join(where)})"

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

    @property
    def _lists(self) -> list[str]:
        """Parts of the names of listed experts' parameters."""
        return sorted({f".{e.module}.{e.listed}." for e in self.experts if e.listed})

    def _expert_table(self) -> str:
        if not self.experts:
            return ""
        rows = []
        for e in self.experts:
            how: dict[str, Any] = {"experts": e.experts, "params": dict(e.params)}
            how |= {"sizes": dict(e.sizes)} if e.sizes else {}
            how |= {"listed": e.listed} if e.listed else {}
            rows.append(f"    ({as_range(e.layers)}, {literal(e.module)}, {literal(how)}),")
        return "\n".join(["EXPERTS = [", *rows, "]"])

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
        lines: list[str] = []
        if self.hf:
            lines += [
                'config = AutoConfig.from_pretrained(HERE / "config.json", use_cache=False)', 'with torch.device("meta"):',
                f"    model = {self._hf_class()}(config).float().train()  # no rank ever holds the whole model", "template = blank(model)",
            ]  # fmt: skip
        else:
            lines += ["torch.manual_seed(seed)", "model = build().train()"]
        lines += ['first, last = STAGES[mesh["pp"].get_local_rank()]'] if x.pp > 1 and x.vpp == 1 else []
        args = ["model", *(["first", "last"] if x.pp > 1 else []), *(["mesh"] if self.converts or self.slices else [])]
        lines.append(f"stage = Stage({', '.join(args)})")
        lines += ["install(model)  # the kernels"] if self.installs else []
        if m.layers and (self.splits or x.tp > 1 or self.recomputes or self.fsdp or self.experts or self.attends):
            lines.append(f"layers = [model.get_submodule(path) for path in LAYERS{self._span}]")
        lines += ["split_backward(stage, layers)  # gradients of their weights wait for a bubble"] if self.splits else []
        lines += self._tensor_parallel() if x.tp > 1 else []
        lines += self._layers()
        bf16 = self.plan.workload.precision == "bf16"
        lines += [f"fully_shard(stage, mesh=mesh.state(), reshard_after_forward=False{', mp_policy=policy' if bf16 else ''})"] if self.fsdp else []
        if self.hf:
            lines += self._weights()
        made = "stage" if self.hf else "stage.to(device)"
        policy = ["policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)"] if bf16 and self.fsdp else []
        modes = [f"mode, covered = RECOMPUTE[{self._rank}]"] if x.recompute == "by stage" else []
        if x.vpp == 1:
            return [*policy, *modes, *lines, f"return [{made}]"]
        after = ["covered -= len(layers)"] if modes else []
        each = [*lines, *after, f"parts.append({made})"]
        loop = ["parts = []", 'for first, last in STAGES[mesh["pp"].get_local_rank()]:', *(f"    {line}" for line in each), "return parts"]
        return [*policy, *modes, *loop]

    @property
    def _span(self) -> str:
        return "[first:last]" if self.x.pp > 1 else ""

    @property
    def _rank(self) -> str:
        return 'mesh["pp"].get_local_rank()' if self.x.pp > 1 else "0"

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

    def _layers(self) -> list[str]:
        """Lines that give each layer its experts, attention, recompute and sharding, in this order."""
        x = self.x
        each = []
        own = "experts" if self.experts else ""
        if self.experts:
            each += [
                "experts = [(layer.get_submodule(path), how) for at, path, how in EXPERTS if i in at]",
                "for module, how in experts:", "    place_experts(module, mesh, **how)",
            ]  # fmt: skip
        if self.attends:
            given = [f'cp=mesh["cp"], kind="{x.cp_kind}"'] if x.cp > 1 else []
            given += ['tp=mesh["tp"]'] if self.plan.solution.kv_replicated else []
            each.append(f"attend(layer, {', '.join(given)})")
        if x.recompute == "by stage":
            start = " - first" if self.x.pp > 1 and self._numbered else ""
            each.append(f'recompute(layer, mode if i{start} < covered else "none")')
        elif self.recomputes:
            each.append(f'recompute(layer, "{x.recompute}")')
        if self.fsdp:
            note = "  # gathered again for backward" if x.zero == 3 else ""
            policy = ", mp_policy=policy" if self.plan.workload.precision == "bf16" else ""
            how = f"reshard_after_forward={x.zero == 3}{policy}){note}"
            each.append(f"fully_shard_layer(layer, [m for m, _ in experts], mesh, {how}" if own else f"fully_shard(layer, mesh=mesh.state(), {how}")
        if not each or not self.plan.model.layers:
            return []
        numbered = self._numbered or x.recompute == "by stage"
        start = ", first" if x.pp > 1 and self._numbered else ""
        return [f"for i, layer in enumerate(layers{start}):" if numbered else "for layer in layers:", *(f"    {line}" for line in each)]

    @property
    def _numbered(self) -> bool:
        """Whether a layer's place in the model matters."""
        return bool(self.experts)

    def _weights(self) -> list[str]:
        """Lines that fill the parameters layer by layer, and the modules outside the layers one by one."""
        program, m = self.program, self.plan.model
        lines = ["allocate(stage, device)"]
        outside = [""]
        if program is not None:
            outside = list(dict.fromkeys(modules_of((*program.stem, *program.side, *program.head))))
        units = f"LAYERS{self._span} + " if m.layers and program else ""
        if self.x.pp > 1 and program is not None:
            stem, head = self._only(program.stem), self._only(program.head)
            lines += [
                f"units = {units}{literal([u for u in outside if u not in (*stem, *head)])}",
                f"units += {literal(stem)} if stage.is_first else []",
                f"units += {literal(head)} if stage.is_last else []",
            ]
        else:
            lines.append(f"units = {units}{literal(outside)}")
        every = sorted((*m.layer_paths, *outside), key=len, reverse=True)
        ties: dict[str, tuple[str, str]] = {}
        for first, *others in m.tied:
            unit_of = {n: next((u for u in every if not u or n.startswith(f"{u}.")), "") for n in (first, *others)}
            home = unit_of[first]
            ties |= {n: (home, first.removeprefix(f"{home}.")) for n in others if unit_of[n] != home}
        args = ["stage.model", "template", "units", "template._init_weights", "seed", "device"]
        args += ["packed=PACKED"] if packed_parameters(self.plan) else []
        args += [f"ties={literal(ties)}"] if ties else []
        return [*lines, *call("fill", args, 8)]

    def _packed(self) -> list[str]:
        """Lines that name the packed parameters, folded over equal layers."""
        inside: dict[tuple[str, tuple[int, int]], list[str]] = {}
        outside: dict[str, tuple[int, int]] = {}
        for name, how in packed_parameters(self.plan).items():
            layer = next((p for p in self.plan.model.layer_paths if name.startswith(p + ".")), "")
            if layer:
                inside.setdefault((name.removeprefix(layer + "."), how), []).append(layer)
            else:
                outside[name] = how
        note = "  # dimension and number of pieces of packed weights"
        lines = [f"PACKED = {literal(outside)}{note}"] if outside or inside else []
        by_layers: dict[tuple[str, ...], dict[str, tuple[int, int]]] = {}
        for (name, how), layers in inside.items():
            by_layers.setdefault(tuple(layers), {})[name] = how
        for paths, names in by_layers.items():
            which = "LAYERS" if paths == self.plan.model.layer_paths else layer_list(paths)
            lines.append(f'PACKED |= {{f"{{path}}.{{name}}": how for path in {which} for name, how in {literal(names)}.items()}}')
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
        given = ", data: TokenFile | None" if self.tokens else ""
        read = [
            "    if data is not None:", "        tokens = data.rows(step * GLOBAL_BATCH + first, count)",
            "        return [tokens[:, :-1]], tokens[:, 1:]",
        ] if self.tokens else []  # fmt: skip
        return [
            f"def batch(step: int, seed: int, first: int, count: int{given}) -> tuple[list[Tensor], Tensor]:",
            '    """Samples [first, first + count) of a step, each from its own seed: the same data in any layout."""', *read,
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

    def _start(self) -> list[str]:
        x = self.x
        degrees = ["pp=PP", "replicate=REPLICATE", "shard=SHARD", *(["cp=CP"] if x.cp > 1 else []), "tp=TP"]
        degrees += ["ep=EP", "etp=ETP"] if self.experts else []
        lines = [
            f"self.mesh = Mesh(device.type, {', '.join(degrees)}, zero={x.zero})",
            "self.parts, self.device, self.seed = parallelize(self.mesh, device, seed), device, seed",
            'self.rank = self.mesh["replicate"].get_local_rank() * SHARD + self.mesh["shard"].get_local_rank()',
            *(["self.data: TokenFile | None = None"] if self.tokens else []),
        ]
        if x.pp > 1:
            rank = 'self.mesh["pp"].get_local_rank()'
            places = f"PLACES[{rank}]" if x.vpp > 1 else f"[{rank}]"
            schedule = SCHEDULES[x.schedule].__name__
            args = [schedule, "self.parts", places, "self.mesh", "MICROBATCHES", "self.loss", f"zero={x.zero}"]
            lines += call("self.schedule = pipeline", args, 8)
            lines += [f"self.pair = first_last_pair(self.mesh, {last_rank(x)})"] if self.ties else []
        return lines

    def _step(self) -> list[str]:
        x, m = self.x, self.plan.model
        lines = [
            "count = GLOBAL_BATCH // (REPLICATE * SHARD)",
            f"inputs, labels = batch(step, self.seed, self.rank * count, count{', self.data' if self.tokens else ''})",
            "inputs, labels = [x.to(self.device) for x in inputs], labels.to(self.device)",
        ]
        if x.cp > 1:
            dims = [token_dim(i.spec, self.plan.workload.seq) for i in m.inputs]
            cut = f'self.mesh["cp"], "{x.cp_kind}")'
            if set(dims) == {dims[0]} and dims[0] is not None:
                lines.append(f"inputs = [slice_tokens(x, {dims[0]}, {cut} for x in inputs]  # this rank's part of each sample")
            else:
                lines += [f"inputs[{i}] = slice_tokens(inputs[{i}], {d}, {cut}" for i, d in enumerate(dims) if d is not None]
            of_labels = token_dim(m.labels.spec, self.plan.workload.seq) if m.labels is not None else None
            lines += [f"labels = slice_tokens(labels, {of_labels}, {cut}"] if of_labels is not None else []
        if x.pp > 1:
            lines.append(f"total = run_schedule(self.schedule, self.parts, inputs, labels, zero={x.zero})")
        else:
            lines.append(f"total = accumulate(self.parts[0], inputs, labels, self.loss, MICROBATCHES, zero={x.zero})")
        if self.ties:
            groups = "TIED" if len(self.ties) == len(m.tied) else literal([list(g) for g in self.ties])
            lines.append(f"add_tied_gradients(self.parts, {groups}, self.pair)")
        return [*lines, f"return mean_over_ranks(total, self.mesh{', 0' if x.pp > 1 and last_rank(x) == 0 else ''})"]


def _positional(name: str) -> bool:
    """Inputs without a name in the sample are numbered."""
    return name.startswith("input_") and name[6:].isdigit()
