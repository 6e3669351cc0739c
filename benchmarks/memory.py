"""The memory model against the dry run: random pairs of a model and a layout, live bytes of one stage each.

    python benchmarks/memory.py                 300 pairs, a table of errors by kind of layout
    python benchmarks/memory.py --pairs 40 --seed 1 --worst 10

A pair is a model (random widths of four architectures, or one of examples/models), a cluster, a sequence length, a precision and a
layout drawn from the planner's space, of what runs, with one recompute or one for each stage; a stage of it is drawn and run as one of
its ranks (meshwright/codegen/dryrun.py).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshwright.codegen.dryrun import DryRun, dry_run
from meshwright.costmodel.layouts import RECOMPUTE, SPLIT
from meshwright.planner.plan import Layout, Plan, Workload
from meshwright.planner.solve import plan_of
from meshwright.planner.space import Space
from meshwright.planner.stages import FULL, Choice, Cut
from meshwright.profiling.cluster import Cluster, parse_cluster
from meshwright.profiling.graph import ModelGraph
from meshwright.profiling.trace import trace

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "models"
SMALL_CLUSTERS = ("1xH100-SXM", "2xH100-SXM", "4xH100-SXM", "6xH100-SXM", "8xH100-SXM")
LARGE_CLUSTERS = ("8x8xH100-SXM", "16x8xH100-SXM")
LARGE = ("llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b", "qwen3-32b", "gpt-3-175b")
BAR = 0.02


@dataclass(frozen=True)
class Pair:
    """A model and a layout of it, and what the model and the dry run say of one stage."""

    model: str
    precision: str
    seq: int
    optimizer: str
    layout: Layout
    microbatches: int
    stage: int
    predicted_bytes: float
    moment: str
    parts: dict[str, float]
    run: DryRun
    choices: tuple[Choice, ...] = ()  # of each stage, where the layout's recompute is by stage

    @property
    def error(self) -> float:
        return self.predicted_bytes / self.run.peak_bytes - 1


def random_config(draw: random.Random) -> dict[str, Any]:
    """A small Llama, Qwen3 or GPT-2 of random widths."""
    heads = draw.choice([4, 6, 8, 12, 16])
    head_dim = draw.choice([32, 64, 80, 128])
    layers = draw.choice([2, 3, 4, 6, 8, 12])
    vocab = draw.choice([1000, 8192, 32000, 50257, 128256])
    kind = draw.choice(["llama", "llama", "qwen3", "gpt2"])
    if kind == "gpt2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return {
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": heads * head_dim, "n_layer": layers, "n_head": heads,
            "vocab_size": vocab, "n_positions": 4096, "bos_token_id": 0, "eos_token_id": 0, **dropout,
        }  # fmt: skip
    name = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[kind]
    return {
        "model_type": kind, "architectures": [name], "hidden_size": heads * head_dim, "head_dim": head_dim,
        "intermediate_size": draw.choice([2, 3, 4]) * heads * head_dim // 64 * 64, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([k for k in (1, 2, 4, heads) if heads % k == 0]), "vocab_size": vocab,
        "max_position_embeddings": 8192, "tie_word_embeddings": draw.random() < 0.3,
    }  # fmt: skip


def boundless(cluster: Cluster) -> Cluster:
    """The cluster with devices on which everything fits, so that any layout may be planned."""
    node = cluster.nodes[0]
    spec = node.spec.model_copy(update={"memory_bytes": 1e18})
    return cluster.model_copy(update={"nodes": (node.model_copy(update={"device": spec}),)})


class Draw:
    """Draws pairs; keeps traces."""

    def __init__(self, seed: int, folder: Path, large: float = 0.3) -> None:
        self.random, self.folder, self.large = random.Random(seed), folder, large
        self.graphs: dict[tuple[str, int, str], ModelGraph] = {}
        self.sources: list[str] = []
        for i in range(12):
            path = folder / f"model-{i}.json"
            path.write_text(json.dumps(random_config(self.random)))
            self.sources.append(str(path))
        self.sources.append(f"{EXAMPLES / 'mixer.py'}:build")

    def graph(self, source: str, seq: int, precision: str) -> ModelGraph:
        key = (source, seq, precision)
        if key not in self.graphs:
            self.graphs[key] = trace(source, seq=seq, precision=precision)
        return self.graphs[key]

    def pair(self) -> Pair:
        draw = self.random
        while True:
            big = draw.random() < self.large
            source = str(EXAMPLES / f"{draw.choice(LARGE)}.json") if big else draw.choice(self.sources)
            seq = draw.choice([2048, 4096, 8192] if big else [128, 512, 1024, 4096])
            seq = min(seq, 2048) if "gpt-3" in source else 64 if "mixer" in source else seq
            precision = draw.choice(["bf16", "bf16", "fp32"])
            cluster = boundless(parse_cluster(draw.choice(LARGE_CLUSTERS if big else SMALL_CLUSTERS)))
            graph = self.graph(source, seq, precision)
            optimizer = draw.choice(["adamw", "adamw", "adamw", "sgd-momentum", "sgd"])
            batch = cluster.size * draw.choice([1, 2, 4, 8])
            workload = Workload(global_batch=batch, seq=seq, precision=precision, optimizer=optimizer)  # type: ignore[arg-type]
            layouts = list(Space(graph, cluster, workload).layouts())
            if not layouts:
                continue
            key = draw.choice(sorted({(x.tp, x.pp) for x in layouts}))  # so that large degrees are as frequent as small ones
            layout = draw.choice([x for x in layouts if (x.tp, x.pp) == key])
            if layout.pp > 1 and draw.random() < 0.2:
                layout = layout.model_copy(update={"schedule": "gpipe", "vpp": 1})
            again = graph.layers and layout.schedule not in SPLIT
            layout = layout.model_copy(update={"recompute": draw.choice([*RECOMPUTE, "by stage"] if again else ["none"])})
            shares = [(draw.randrange(len(RECOMPUTE)), draw.random()) for _ in range(layout.pp if layout.recompute == "by stage" else 0)]
            return check(graph, cluster, workload, layout, draw.randrange(layout.pp), shares)


def check(
    graph: ModelGraph, cluster: Cluster, workload: Workload, layout: Layout, stage: int, shares: Sequence[tuple[int, float]] = ()
) -> Pair:
    """The model's and the dry run's bytes of a stage of a layout. `shares`, where its recompute is by stage: of each stage, the mode, and
    for full the share of its layers that have it."""
    search, found = plan_of(graph, cluster, workload, layout)
    assert isinstance(found, Plan)
    chunks = [s.chunks or (s.layers,) for s in found.solution.stages]
    lengths = [sum(b - a for a, b in own) for own in chunks]
    if layout.recompute == "by stage":
        counts = [(mode, round(share * n) if mode == FULL else n if mode else 0) for (mode, share), n in zip(shares, lengths, strict=True)]
        choices = tuple(Choice(mode, layers) for mode, layers in counts)
        found = recomputing(found, choices)
    else:
        mode = RECOMPUTE.index(layout.recompute)
        choices = tuple(Choice(mode, n if mode else 0) for n in lengths)
    row, ends = search.row(layout), tuple(sorted(b for own in chunks for _, b in own))
    stages = search.stages(row)
    costs = stages.cost(ends, choices)
    name, what, parts = search.memory_of(search.candidate(row, Cut(stages.step(costs), ends, choices, costs)), stage)
    assert abs(sum(parts.values()) - costs[stage].live_bytes) <= 1e-9 * costs[stage].live_bytes
    run = dry_run(found, stage * (layout.devices // layout.pp))
    return Pair(
        graph.name, graph.precision, graph.seq, workload.optimizer, layout, found.microbatches, stage, sum(parts.values()),
        f"{name} of {what}", parts, run, choices if layout.recompute == "by stage" else (),
    )  # fmt: skip


def recomputing(plan: Plan, choices: Sequence[Choice]) -> Plan:
    """The plan with each stage's own recompute."""
    stages = [
        s.model_copy(update={"recompute": RECOMPUTE[c.mode], "recompute_layers": c.layers if c.mode else None})
        for s, c in zip(plan.solution.stages, choices, strict=True)
    ]
    layout = plan.layout.model_copy(update={"recompute": "by stage"})
    solution = plan.solution.model_copy(update={"layout": layout, "stages": tuple(stages)})
    return plan.model_copy(update={"solution": solution, "alternatives": ()})


def show(p: Pair, out: Any = sys.stdout) -> None:
    """A pair in a few lines."""
    gib = 2.0**30
    own = f": {RECOMPUTE[p.choices[p.stage].mode]} in {p.choices[p.stage].layers} layers" if p.choices else ""
    where = f"{p.layout}  m={p.microbatches} stage {p.stage}{own}"
    print(f"{100 * p.error:+6.2f} %  {p.model} {p.precision} seq {p.seq} {p.optimizer}  {where}", file=out)
    told = f"{p.run.phase} {p.run.module} {p.run.op}"
    print(f"          model {p.predicted_bytes / gib:.3f} GiB, {p.moment};  dry run {p.run.peak_bytes / gib:.3f} GiB, {told}", file=out)
    for k in sorted({*p.parts, *p.run.by_kind}):
        a, b = p.parts.get(k, 0.0), p.run.by_kind.get(k, 0.0)
        if abs(a - b) > 1e-3 * p.run.peak_bytes:
            print(f"          {k:14} {a / gib:9.3f} {b / gib:9.3f}", file=out)


def groups(p: Pair) -> list[str]:
    x = p.layout
    return [
        "all", p.precision, f"ZeRO {x.zero}" if x.dp > 1 else "dp 1", f"recompute {x.recompute}",
        "tp + sp" if x.sp else "tp" if x.tp > 1 else "no tp", x.schedule if x.pp > 1 else "one stage", p.optimizer,
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--large", type=float, default=0.3, help="share of pairs with a model of examples/models")
    parser.add_argument("--worst", type=int, default=5, help="how many of the worst pairs to show")
    args = parser.parse_args()
    started = time.perf_counter()
    pairs: list[Pair] = []
    with tempfile.TemporaryDirectory() as folder:
        draw = Draw(args.seed, Path(folder), args.large)
        for i in range(args.pairs):
            pairs.append(draw.pair())
            if abs(pairs[-1].error) > BAR:
                show(pairs[-1], sys.stderr)
            if (i + 1) % 10 == 0:
                print(f"{i + 1} of {args.pairs}, worst {100 * max(abs(p.error) for p in pairs):.2f} %", file=sys.stderr, flush=True)
    table: dict[str, list[float]] = defaultdict(list)
    for p in pairs:
        for g in groups(p):
            table[g].append(abs(p.error))
    print(f"{len(pairs)} pairs, seed {args.seed}: live bytes of the memory model over those of the dry run")
    print(f"{'':20} {'pairs':>6} {'median %':>9} {'worst %':>9} {'within 2 %':>11}")
    for g, errors in table.items():
        within = sum(e <= BAR for e in errors) / len(errors)
        print(f"{g:20} {len(errors):6} {100 * statistics.median(errors):9.3f} {100 * max(errors):9.2f} {within:10.1%}")
    print(f"{time.perf_counter() - started:.0f} s")
    for p in sorted(pairs, key=lambda p: -abs(p.error))[: args.worst]:
        show(p)


if __name__ == "__main__":
    main()
