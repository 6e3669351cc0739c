"""Errors of compiled cost models on samples held out by key, for every GPU of a tree of operator tables.

    python benchmarks/op_accuracy.py TREE [--gpu h100_sxm ...] [--max-kb 950]
    python benchmarks/op_accuracy.py --shipped

The second form prints what the shipped models say of themselves: the same errors, from when they were made. `random fifth` is
a fifth of the keys; `largest tenth` are the largest samples, none of which the fit saw; `unseen` are sizes (k of a product, heads of
attention, the shape of a mixture's experts) that occur in no sample of the fit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from meshwright.costmodel.compile import compile_profile
from meshwright.costmodel.model import CostModel, shipped_names
from meshwright.profiling.errors import InputError
from meshwright.profiling.importers.aiconfigurator import import_tree
from meshwright.report.costs import merged

SPLITS = ("random fifth", "largest tenth", "unseen shapes")


def grouped(report: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Errors by class and group, then by split."""
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for r in merged(report):
        out.setdefault(f"{r['class']} {r['group']}", {})[r["split"]] = r
    return out


def table(model: CostModel) -> Table:
    t = Table(title=f"{model.device}: |predicted / measured - 1| in %, median (p90)", title_justify="left", box=None)
    t.add_column("class", no_wrap=True)
    for name in ("n", *SPLITS, "in the 90 % interval"):
        t.add_column(name, justify="right")
    for name, splits in grouped(model.report).items():
        first = splits.get("random fifth", {})
        cells = [f"{100 * s['median']:.1f} ({100 * s['p90']:.1f})" if (s := splits.get(k)) else "" for k in SPLITS]
        covered = f"{100 * first['covered']:.0f} %" if "covered" in first else ""
        t.add_row(name, f"{first.get('n', 0):,.0f}", *cells, covered)
    return t


def report_ops(tree: Path | None, gpus: list[str], max_kb: float, console: Console) -> None:
    """Prints one table a GPU; of the shipped models where no tree is given."""
    if tree is None:
        for name in shipped_names():
            console.print(table(CostModel.load(name)))
        return
    wanted = gpus or sorted(p.stem for p in (*tree.glob("systems/*.yaml"), *tree.glob("*.yaml")))
    if not wanted:
        raise InputError(f"{tree} holds no systems/<gpu>.yaml")
    for gpu in wanted:
        model = compile_profile(import_tree(tree, gpu), lambda what: print(f"\r{what:70}", end="", file=sys.stderr), max_kb * 1000)
        print(file=sys.stderr)
        console.print(table(model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("tree", nargs="?", type=Path, help="the folder that holds systems/")
    parser.add_argument("--gpu", nargs="*", default=[], help="which GPUs; all by default")
    parser.add_argument("--max-kb", type=float, default=950.0, help="size of each model at most, in kB")
    parser.add_argument("--shipped", action="store_true", help="print the reports of the shipped models")
    args = parser.parse_args()
    if args.tree is None and not args.shipped:
        parser.error("give the tree of operator tables, or --shipped")
    try:
        report_ops(args.tree, args.gpu, args.max_kb, Console(width=120))
    except InputError as e:
        sys.exit(f"op_accuracy: {e}")


if __name__ == "__main__":
    main()
