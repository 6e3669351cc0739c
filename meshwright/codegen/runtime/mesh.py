"""The device mesh of a layout: every group of ranks that a step communicates over.

Ranks are ordered pp, replicate, shard, cp, tp, with tp innermost. Two other views of the same ranks shard the state: `copies` x `state`
hold the parameters (context-parallel ranks share them like data-parallel ones), `expert_copies` x `expert_state` x `ep` x `etp` those of
experts, folded over all ranks of a stage with etp innermost. They are made when they are first asked for, by every rank, that of
experts at once where experts are spread; a dimension of one rank has no group.
"""

from typing import Any

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


class _One:
    """A dimension of one rank."""

    def size(self) -> int:
        return 1

    def get_local_rank(self) -> int:
        return 0


class Mesh:
    """mesh["tp"] is one dimension; mesh["ep", "etp"] several of the same view."""

    def __init__(self, device_type: str, *, pp: int = 1, replicate: int = 1, shard: int = 1, cp: int = 1, tp: int = 1, ep: int = 1, etp: int = 1,
                 zero: int = 0) -> None:  # fmt: skip
        ranks = replicate * shard * cp * tp
        self.device_type = device_type
        self.degrees = {"pp": pp, "replicate": replicate, "shard": shard, "cp": cp, "tp": tp, "ep": ep, "etp": etp}
        self.world = init_device_mesh(device_type, (pp * ranks,), mesh_dim_names=("world",))
        copies = replicate if zero else replicate * shard * cp
        experts = ranks // (ep * etp)
        expert_copies = replicate if zero else experts
        self._shapes: list[dict[str, int]] = [
            {"pp": pp, "replicate": replicate, "shard": shard, "cp": cp, "tp": tp},
            {"stages": pp, "copies": copies, "state": replicate * shard * cp // copies, "ranks": tp},
            {"layers": pp, "expert_copies": expert_copies, "expert_state": experts // expert_copies, "ep": ep, "etp": etp},
        ]
        self._views: dict[int, DeviceMesh] = {}
        if pp * ranks > 1:
            self._view(0)
        if ep * etp > 1:
            self._view(2)

    def __getitem__(self, names: str | tuple[str, ...]) -> Any:
        first = names if isinstance(names, str) else names[0]
        at = next(i for i, shape in enumerate(self._shapes) if first in shape)
        if at == 0 and self._shapes[0][first] == 1:
            return _One()
        return self._view(at)[names]

    def _view(self, at: int) -> DeviceMesh:
        """One view; what state is sharded over is a dimension even of one rank, others are left out then."""
        if at not in self._views:
            shape = {name: n for name, n in self._shapes[at].items() if n > 1 or name in ("state", "expert_state", "ep", "etp")}
            self._views[at] = self.world._unflatten(0, tuple(shape.values()), tuple(shape))
        return self._views[at]

    @property
    def compute(self) -> DeviceMesh:
        """The view that computes, with all of its dimensions of several ranks."""
        return self._view(0)

    def state(self) -> DeviceMesh:
        """Where FSDP shards parameters: `state`, or `copies` x `state` where whole copies exist."""
        return self["state"] if self._shapes[1]["copies"] == 1 else self["copies", "state"]  # type: ignore[no-any-return]

    def expert_state(self) -> DeviceMesh:
        """Where FSDP shards the parameters of experts that a rank holds."""
        return self["expert_state"] if self._shapes[2]["expert_copies"] == 1 else self["expert_copies", "expert_state"]  # type: ignore[no-any-return]
