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
    for split, title in SPLITS.items():
        rows = merged([r for r in model.report if r["split"] == split])
        if rows:
            console.print()
            console.print(_table(title, rows))
    return out.getvalue()


def merged(report: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a report with the many small groups of DeepEP (by nodes) put together, each counted by its samples."""
    out: list[dict[str, Any]] = []
    small: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in report:
        if r["class"] == "deepep":
            name = " ".join(r["group"].split("|")[:2])
            if (name, r["split"]) not in small:
                out.append({"class": "deepep", "group": name, "split": r["split"]})
            small.setdefault((name, r["split"]), []).append(r)
        else:
            out.append({**r, "group": r["group"].replace("|", " ")})
    for row in out:
        if "n" not in row:
            rows = small[row["group"], row["split"]]
            n = sum(r["n"] for r in rows)
            row.update({k: sum(r["n"] * r[k] for r in rows) / n for k in ("median", "mean", "p90", "roofline_median")}, n=n)
    return out


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"Held out: {title}. Errors in %", title_justify="left", box=None, pad_edge=False)
    table.add_column("", no_wrap=True, max_width=50)
    for name in ("samples", "median", "mean", "p90", "roofline", "in 90%"):
        table.add_column(name, justify="right", no_wrap=True, min_width=max(5, len(name)))
    for r in rows:
        cells = [f"{100 * r[k]:.1f}" for k in ("median", "mean", "p90")]
        more = [f"{100 * r[k]:.{d}f}" if k in r else "" for k, d in (("roofline_median", 1), ("covered", 0))]
        name = r["class"].replace("collective", "").replace("_", " ")
        table.add_row(f"{name} {r['group']}".strip(), f"{r['n']:,}", *cells, *more)
    return table
