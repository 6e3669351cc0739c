"""A cost model in the terminal: where it comes from, and how wrong it is on samples that it did not see."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console
from rich.table import Table

from meshwright.costmodel.model import CostModel

WIDTH = 100
SPLITS = {
    "random fifth": "a random fifth",
    "largest tenth": "the largest tenth, held out whole",
    "unseen shapes": "shapes that occur in no other sample",
}


def render_costs(model: CostModel) -> str:
    """At most 100 columns."""
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, highlight=False, no_color=True)
    p = model.provenance
    console.print(f"Cost model of {model.device}")
    console.print(f"  {model.origin}")
    for key in ("gpu", "torch", "driver", "threads", "ranks"):
        if p.get(key):
            console.print(f"  {key}: {p[key]}")
    counts = p.get("samples", {})
    if counts:
        console.print("  samples: " + ", ".join(f"{n:,} {kind}" for kind, n in counts.items()))
    for split in ("random fifth", "largest tenth", "unseen shapes"):
        rows = [r for r in model.report if r["split"] == split]
        if rows:
            console.print()
            console.print(_table(split, rows))
    return out.getvalue()


def _table(split: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"Held out: {SPLITS[split]}", title_justify="left", box=None, pad_edge=False)
    for name in ("class", "group"):
        table.add_column(name, no_wrap=True, max_width=38)
    for name in ("samples", "median %", "mean %", "p90 %", "roofline %", "in 90 %"):
        table.add_column(name, justify="right")
    for r in rows:
        cells = [f"{100 * r[k]:.1f}" for k in ("median", "mean", "p90")]
        more = [f"{100 * r[k]:.{d}f}" if k in r else "" for k, d in (("roofline_median", 1), ("covered", 0))]
        table.add_row(r["class"].replace("attention_", "att. "), r["group"].replace("|", " "), f"{r['n']:,}", *cells, *more)
    return table
