"""Layers to pipeline stages with recompute of each stage's own, exactly: which layers a rank holds, and which of them it runs again.

A step costs (m - ratio) max C + ratio sum C + max E over the ranks (costmodel/step.py): C seconds of a microbatch, E seconds once a
step. One chunk a rank: every cut into contiguous, possibly uneven stages and every choice of recompute. Recompute changes C and memory
only, so a stage takes the cheapest choice that fits its memory, whatever the others do. What is left is a shortest path over stages for
every pair of thresholds (T, U) on max C and max E: the least sum C with C <= T and E <= U. Pairs are bounded in boxes: the sum at a
box's upper corner with the thresholds at its lower corner is a lower bound of all that lies in it. Nothing is rounded away or sampled,
and no memory is assumed to grow or fall with the layers recomputed.

Several chunks a rank: the cuts are those of `spreads`, and each rank takes the cheapest choice that fits.

What a layer holds may depend on the modes of its neighbours (a layer that keeps what goes in beside one that keeps what comes out),
not on layers further off; and layers of one kind hold alike wherever they stand between the first and the last.
"""

from __future__ import annotations

import numpy as np

from meshwright.planner.stagecuts import _Contiguous
from meshwright.planner.stageproblem import FULL, MODES, NONE, SELECTIVE, Choice, Chunks, Cut, StageCost, StageProblem, spreads
from meshwright.planner.stageranks import Ranks
from meshwright.planner.stagespread import _Spread


class Stages(Ranks):
    """The stage problem of one layout."""

    def best(self, cutoff: float = np.inf) -> Cut | None:
        """The cheapest cut that fits and takes less than `cutoff` seconds; None if there is none. Of equal ones that with the smaller ends,
        in order; each rank with its cheapest choice that fits, of equal ones that with less recompute."""
        if self.p.layers == 0 and self.p.pp == 1:
            cut = self._no_layers()
            return cut if cut.costs[0].live_bytes <= self.capacity[0] and cut.step_s < cutoff else None
        if self.p.layers < self.p.pp * self.p.vpp:
            return None
        found = _Spread(self).best(cutoff) if self.p.vpp > 1 or self.p.pp == 1 else _Contiguous(self).best(cutoff)
        return found if found is not None and found.step_s < cutoff else None

    def least_memory(self) -> tuple[float, Cut]:
        """The cut whose fullest rank is least over its own capacity, each rank as cheap as that allows, and by how many bytes it is."""
        if self.p.layers == 0 and self.p.pp == 1:
            cut = self._no_layers()
            return cut.costs[0].live_bytes - float(self.capacity[0]), cut
        if self.p.layers < self.p.pp * self.p.vpp:
            raise ValueError(f"{self.p.layers} layers cannot be cut into {self.p.pp * self.p.vpp} stages")
        return _Spread(self).least_memory() if self.p.vpp > 1 or self.p.pp == 1 else _Contiguous(self).least_memory()


__all__ = ["FULL", "MODES", "NONE", "SELECTIVE", "Choice", "Chunks", "Cut", "StageCost", "StageProblem", "Stages", "spreads"]
