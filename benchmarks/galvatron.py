"""Galvatron's chosen plan and ours, side by side, under Galvatron's published profile: the same layer times, bandwidths and limit.

    python benchmarks/galvatron.py --profiles FOLDER [FOLDER ...]

The folders hold the JSON files of its profilers (the model's and the cluster's may lie apart) and the plan that its search wrote.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from datetime import date
from itertools import groupby
from pathlib import Path

from meshwright.costmodel.layerprofile import EXACT, GALVATRON, Pricer
from meshwright.planner.layerwise import Found, search
from meshwright.profiling.errors import InputError
from meshwright.profiling.importers.galvatron import read_galvatron
from meshwright.profiling.layerprofile import LayerPlan, LayerProfile

RESULT = Path(__file__).parent / "results" / "galvatron.txt"
WANTED = 0.03
# What the run of its search that chose the plan printed: 2 CPU cores, microbatches held at 8, 24 tasks.
REPORTED_STEP_S, REPORTED_SAMPLES, REPORTED_MB, REPORTED_SEARCH_S = 4.480, 14.286, "38798, 38581", 24.8


def describe(plan: LayerPlan) -> list[str]:
    """The plan in lines."""
    out = [f"layers of the stages {'+'.join(map(str, plan.cut))}, microbatches {plan.microbatches}, embedding and head: {plan.vocab}"]
    for i in range(plan.stages):
        out.append(f"stage {i}: " + ", ".join(f"{len(list(same))} x {s}" for s, same in groupby(plan.of_stage(i))))
    return [line for text in out for line in textwrap.wrap(text, 128, subsequent_indent="  ")]


def proof(found: Found) -> str:
    c = found.certificate
    return (
        f"{c.outer} choices of stages, microbatches and ends, 10^{c.plans_log10:.0f} plans; {c.pruned} choices pruned by bound, {c.cuts} cuts, "
        f"{c.evaluated} states evaluated; bound {c.bound_s:.4f} s, gap {100 * c.gap:.2f} %; {c.seconds:.2f} s"
    )


def recomputed_MB(profile: LayerProfile, plan: LayerPlan) -> float:
    """MB that one checkpointed layer makes again for its backward: activations that the memory model does not count."""
    assert profile.layer is not None
    each = plan.batch // plan.microbatches
    again = [s for s in plan.layers if s.checkpoint]
    return max((each // s.data * (profile.layer.activation_MB[s.degree] - profile.layer.checkpoint_MB / s.degree) for s in again), default=0.0)


def lines(profile: LayerProfile, folders: list[str]) -> list[str]:
    """The benchmark's text."""
    its = profile.plan
    if its is None or profile.plan_limit_MB is None:
        raise InputError("the folders hold no galvatron_config_*GB*.json: there is no plan to compare with")
    devices, limit = its.stages * its.vocab.degree * its.vocab.data, profile.plan_limit_MB
    same, exact = (Pricer(profile, devices, its.batch, limit, a) for a in (GALVATRON, EXACT))
    runs = {
        "its space, its microbatches": search(same, [its.microbatches], own=True),
        "its space, any microbatches": search(same, own=True),
        "ours, its microbatches": search(exact, [its.microbatches]),
        "ours": search(exact),
    }
    ours = runs["ours"].plan
    if ours is None:
        raise InputError(f"no plan fits {limit:.0f} MB")
    rows: list[tuple[str, LayerPlan, float]] = [("Galvatron's plan", its, REPORTED_SEARCH_S)]
    rows += [(name, f.plan, f.certificate.seconds) for name, f in runs.items() if f.plan is not None]
    out = [
        f"{date.today()}, python benchmarks/galvatron.py --profiles {' '.join(folders)}",
        "",
        f"{profile.model}, {profile.layers} layers, sequence {profile.sequence}, batch {its.batch}, {devices} devices, limit {limit:.0f} MB a rank",
        "Both plans priced by one function. Its account: the formulas that its search uses. Exact account: 1F1B followed event by event,",
        "ZeRO-3 gathers for the backward too, all collectives of tensor and sequence parallelism. Memory is the same in both, with the",
        f"{same.reserve_MB:.0f} MB that it keeps back for the allocator. Searches ran on one core; its own took {REPORTED_SEARCH_S} s on two.",
        "",
        f"{'':30}{'its account':>22}{'exact account':>22}   {'memory of each stage':24}{'search':>8}",
        f"{'':30}{'step s':>11}{'samples/s':>11}{'step s':>11}{'samples/s':>11}   {'MB':24}{'s':>8}",
    ]
    out.append(f"{'as it reported its plan':30}{REPORTED_STEP_S:11.3f}{REPORTED_SAMPLES:11.3f}{'':22}   {REPORTED_MB:24}{REPORTED_SEARCH_S:8}")
    for name, plan, seconds in rows:
        a, b = same.price(plan), exact.price(plan)
        held = ", ".join(f"{s.memory_MB + a.reserve_MB:.0f}" for s in a.stages) + ("" if a.fits else " over")
        took = "" if plan is its else f"{seconds:8.2f}"
        out.append(f"{name:30}{a.step_s:11.4f}{a.samples_per_s:11.3f}{b.step_s:11.4f}{b.samples_per_s:11.3f}   {held:24}{took}")
    for name, plan, _ in rows:
        if plan in (its, ours) and name in ("Galvatron's plan", "ours"):
            out += ["", f"{name}: {describe(plan)[0]}", *(f"  {line}" for line in describe(plan)[1:])]
            most = max(s.memory_MB for s in same.price(plan).stages) + recomputed_MB(profile, plan)
            out.append(f"  with what one checkpointed layer makes again for its backward, which neither counts: {most:.0f} of {limit:.0f} MB")
    out += ["", "Proof of each search"]
    for name, f in runs.items():
        out += textwrap.wrap(f"{name}: {proof(f)}", 136, initial_indent="  ", subsequent_indent="    ")
    margins = []
    for name, pricer in (("its account", same), ("the exact account", exact)):
        margin = 1 - pricer.price(ours).step_s / pricer.price(its).step_s
        margins.append(margin)
        out.append(f"{'' if margins[1:] else chr(10)}Ours takes {100 * margin:.1f} % less than Galvatron's plan in {name}.")
    if min(margins) < WANTED:
        bound = runs["ours"].certificate.bound_s
        out.append(f"That is less than {WANTED:.0%}; nothing better exists: no plan takes less than {bound:.4f} s in the exact account.")
    least = runs["its space, its microbatches"].certificate.bound_s
    near = 1 - least / same.price(its).step_s
    out.append(
        f"With {its.microbatches} microbatches, as its run held them, its plan is within {100 * near:.1f} % of the best of its space in its account "
        f"({least:.4f} s)."
    )
    free = runs["its space, any microbatches"].certificate.bound_s
    out.append(f"Its space with any number of microbatches holds a plan of {free:.4f} s in its account: what is gained lies in their number.")
    return [line.rstrip() for line in out]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", nargs="+", required=True, help="folders of Galvatron's JSON files")
    args = parser.parse_args()
    try:
        text = "\n".join(lines(read_galvatron([Path(p) for p in args.profiles]), args.profiles)) + "\n"
    except InputError as e:
        print(f"galvatron: {e}", file=sys.stderr)
        sys.exit(2)
    print(text, end="")
    RESULT.write_text(text)


if __name__ == "__main__":
    main()
