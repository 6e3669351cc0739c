"""Cells of a table of runs: typed access, and the many spellings of a sharding, a schedule and a recompute policy."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from meshwright.profiling.errors import InputError

EMPTY = frozenset(("", "nan", "none", "null", "n/a", "na", "-", "?"))
SCHEDULES = ("1f1b", "interleaved", "gpipe", "zb-1p", "zb-2p", "zb-v", "v-half", "v-min", "dualpipe", "dualpipe-v")


MOST = 1e15  # no cell of a run is larger: parameters, tokens, FLOP/s in units of 1e12


class Cells:
    """Typed access to one row. InputError names file, row and column."""

    def __init__(self, row: Mapping[str, str | None], where: str) -> None:
        self.row, self.where = row, where

    def text(self, column: str) -> str:
        value = (self.row.get(column) or "").strip()
        return "" if value.lower() in EMPTY - {"none"} else value

    def number(self, column: str, low: float = 0.0) -> float | None:
        value = self.text(column).replace(",", "").replace("_", "")
        if value.lower() in EMPTY:
            return None
        try:
            x = float(value)
        except ValueError:
            raise InputError(f"{self.where}, column {column}: {value!r} is not a number") from None
        if not math.isfinite(x) or x > MOST:
            raise InputError(f"{self.where}, column {column}: {value} must be a number of at most {MOST:g}")
        if x < low:
            raise InputError(f"{self.where}, column {column}: {value} must be at least {low:g}")
        return x

    def count(self, column: str) -> int | None:
        x = self.number(column, 0.0)
        if x is not None and x != round(x):
            raise InputError(f"{self.where}, column {column}: {x:g} must be a whole number")
        return None if x is None or x < 1 else round(x)

    def flag(self, column: str) -> bool | None:
        value = self.text(column).lower()
        return True if value in ("true", "1", "1.0", "yes", "on") else False if value in ("false", "0", "0.0", "no", "off", "none") else None


def sharding_of(text: str, dp: float) -> tuple[int, float]:
    """(ZeRO stage, ranks that share one copy) from a cell like "zero1(group 8)", "fsdp64", "fsdp_shard_grad_op(zero2)", "3"."""
    low = text.lower()
    if low in ("none", "ddp", "zero0", "no", "0", "0.0"):
        return 0, 1.0
    stage = re.search(r"zero[- _]?(?:stage)?[- _]?([0-3])", low) or re.match(r"(?:stage)?\s*([0-3])(?:\.0)?$", low)
    if stage:
        number = int(stage[1])
    elif "grad_op" in low:
        number = 2
    elif any(w in low for w in ("fsdp", "full", "hybrid", "hsdp", "fully", "zero")):
        number = 3
    elif "optim" in low:
        number = 1
    else:
        number = 0
    group = re.search(r"group\D*(\d+)", low) or re.search(
        r"[fh]sdp2?\s*\(?(\d{1,4})\)?(?:\D|$)", re.sub(r"zero[-_ ]?[0-3]", "", low).replace("fsdp2", "fsdp")
    )
    ranks = float(group[1]) if group and int(group[1]) >= 1 else dp
    return number, max(1.0, min(ranks, dp))


def schedule_of(text: str) -> tuple[str, bool]:
    """One of SCHEDULES from any spelling, and whether the layers were redistributed to balance the stages."""
    low = text.lower().replace("_", "-").replace(" ", "-")
    balanced = "redistribut" in low or "balance" in low
    if "dual" in low:
        return ("dualpipe-v" if re.search(r"dualpipe-?v", low) else "dualpipe"), balanced
    if re.search(r"v-?half", low):
        return "v-half", balanced
    if re.search(r"v-?min", low):
        return "v-min", balanced
    if re.search(r"zb-?v|v-?zb|v-?schedule|zero-?bubble-?v", low):
        return "zb-v", balanced
    if re.search(r"zb-?(2p|h2)", low):
        return "zb-2p", balanced
    if re.search(r"zb|zero-?bubble", low):
        return "zb-1p", balanced
    if "gpipe" in low or "afab" in low or "all-forward" in low:
        return "gpipe", balanced
    if re.search(r"interleav|1f1b-?i(nt|$)|-i$|virtual|vpp", low):
        return "interleaved", balanced
    return "1f1b", balanced


def recompute_of(text: str) -> str:
    """none, selective or full from any spelling; empty if the cell is."""
    low = text.lower()
    if low in ("", "nan", "?"):
        return ""
    if low in ("none", "false", "no", "off", "0", "0.0", "[]"):
        return "none"
    if any(w in low for w in ("select", "sac", "partial", "attn", "attention", "norm", "act", "every", "moe", "mla", "op")) and "full" not in low:
        return "selective" if "activation checkpointing" not in low else "full"
    return "full"
