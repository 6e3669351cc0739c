"""Plans that the planner did not choose, made from ones that it did."""

from __future__ import annotations

from typing import Any

from meshwright.planner.plan import Plan


def recomputing(plan: Plan, stages: list[dict[str, Any]]) -> Plan:
    """The plan with recompute by stage: `recompute` and perhaps `recompute_layers` of each, which needs no other part of a plan."""
    own = tuple(s.model_copy(update=made) for s, made in zip(plan.solution.stages, stages, strict=True))
    layout = plan.layout.model_copy(update={"recompute": "by stage"})
    made = plan.model_copy(update={"solution": plan.solution.model_copy(update={"layout": layout, "stages": own}), "alternatives": ()})
    assert made.verify() == []
    return made
