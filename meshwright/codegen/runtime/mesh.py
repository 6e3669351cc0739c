"""The device mesh of a layout: every group of ranks that a step communicates over.

Ranks are ordered pp, replicate, shard, cp, tp, with tp innermost. Two other views of the same ranks shard the state: `copies` x `state`
hold the parameters (context-parallel ranks share them like data-parallel ones), `expert_copies` x `expert_state` x `ep` x `etp` those of
experts, folded over all ranks of a stage with etp innermost.
"""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

COMPUTE = ("pp", "replicate", "shard", "cp", "tp")


class Mesh:
    """mesh["tp"] is one dimension; mesh["copies", "state"] several of the same view."""

    def __init__(self, device_type: str, *, pp: int = 1, replicate: int = 1, shard: int = 1, cp: int = 1, tp: int = 1, ep: int = 1, etp: int = 1,
                 zero: int = 0) -> None:  # fmt: skip
        ranks = replicate * shard * cp * tp
        self.device_type = device_type
        self.degrees = {"pp": pp, "replicate": replicate, "shard": shard, "cp": cp, "tp": tp, "ep": ep, "etp": etp}
        world = init_device_mesh(device_type, (pp * ranks,), mesh_dim_names=("world",))
        copies = replicate if zero else replicate * shard * cp
        experts = ranks // (ep * etp)
        expert_copies = replicate if zero else experts
        shapes = {
            COMPUTE: (pp, replicate, shard, cp, tp),
            ("stages", "copies", "state", "ranks"): (pp, copies, replicate * shard * cp // copies, tp),
            ("layers", "expert_copies", "expert_state", "ep", "etp"): (pp, expert_copies, experts // expert_copies, ep, etp),
        }
        self.views: dict[str, DeviceMesh] = {}
        for names, shape in shapes.items():
            view = world._unflatten(0, shape, names)
            self.views.update(dict.fromkeys(names, view))

    def __getitem__(self, names: str | tuple[str, ...]) -> DeviceMesh:
        first = names if isinstance(names, str) else names[0]
        return self.views[first][names]

    @property
    def compute(self) -> DeviceMesh:
        """The view that computes, with all of its dimensions."""
        return self.views["pp"]

    def state(self) -> DeviceMesh:
        """Where FSDP shards parameters: `state`, or `copies` x `state` where whole copies exist."""
        return self["state"] if self["copies"].size() == 1 else self["copies", "state"]

    def expert_state(self) -> DeviceMesh:
        """Where FSDP shards the parameters of experts that a rank holds."""
        return self["expert_state"] if self["expert_copies"].size() == 1 else self["expert_copies", "expert_state"]
