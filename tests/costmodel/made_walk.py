"""A training step on one stage as FSDP2 of torch 2.13 takes it, event by event: an account of bytes, made and freed one by one.

Written from torch/distributed/fsdp/_fully_shard (`unshard`, `wait_for_unshard`, `post_backward`, `foreach_reduce`,
`_root_post_backward_final_callback`) and from codegen/apply.py, not from costmodel/stagememory.py. The blocks outside the layers are one
group, the root; each layer is a group.
"""

from __future__ import annotations

from meshwright.costmodel.stagememory import Blocks, Shape

ROOT = -1


class Account:
    """What is alive, by name, and the most that was."""

    def __init__(self) -> None:
        self.held: dict[object, float] = {}
        self.total = self.peak = 0.0
        self.when = ""
        self.at: dict[object, float] = {}
        self.now = ""

    def make(self, name: object, nbytes: float) -> None:
        assert name not in self.held, f"{name} is there"
        self.held[name] = nbytes
        self.total += nbytes
        if self.total > self.peak:
            self.peak, self.when, self.at = self.total, self.now, dict(self.held)

    def free(self, *names: object) -> None:
        for name in names:
            self.total -= self.held.pop(name, 0.0)

    def touch(self, name: object, nbytes: float) -> None:
        """Made and freed at once."""
        self.make(name, nbytes)
        self.free(name)


class Step:
    """One training step of a model of one stage."""

    def __init__(self, b: Blocks, x: Shape) -> None:
        assert x.pp == 1
        self.b, self.x, self.account = b, x, Account()
        self.blocks = range(len(b.layer))
        self.layers = [j for j in self.blocks if b.layer[j]]
        self.roots = [j for j in self.blocks if not b.layer[j]]
        self.gathered: set[int] = set()
        self.ahead: set[int] = set()  # all-gathers that were issued and not waited for
        self.waited: int | None = None  # whose flat buffer is kept until the next wait
        self.reading: int | None = None  # whose reduce-scatter input is kept
        self.sharded_grads: set[int] = set()
        self.sums: set[int] = set()

    # -- of a group

    def of(self, group: int, values: object) -> float:
        return float(sum(values[j] for j in (self.roots if group == ROOT else [group])))  # type: ignore[index]

    def fresh(self, group: int) -> list[tuple[str, int]]:
        return [("gradient", j) for j in (self.roots if group == ROOT else [group])]

    def last_numel(self, group: int) -> float:
        own = [j for j in (self.roots if group == ROOT else [group]) if self.b.numel[j] > 0]
        return float(self.b.last_numel[own[-1]]) if own else 0.0

    # -- FSDP

    def unshard(self, group: int) -> None:
        """Issues the all-gather, where there are ranks to gather from: a flat buffer for the result."""
        if group not in self.gathered and group not in self.ahead:
            self.ahead.add(group)
            if self.x.shards > 1:
                self.account.make(("flat", group), self.x.compute_bytes * self.of(group, self.b.padded))

    def wait(self, group: int, forward: bool) -> None:
        """Copies out of the flat buffer. In forward that stays to the end of the next wait; in backward it goes at once."""
        if group not in self.ahead:
            return
        self.ahead.remove(group)
        self.account.make(("gathered", group), self.x.compute_bytes * self.of(group, self.b.padded))
        self.gathered.add(group)
        if forward:
            self.forget()
            self.waited = group
        else:
            self.account.free(("flat", group))

    def forget(self) -> None:
        if self.waited is not None:
            self.account.free(("flat", self.waited))
            self.waited = None

    def reshard(self, group: int) -> None:
        self.account.free(("gathered", group))
        self.gathered.discard(group)

    def post_backward(self, group: int, last: bool) -> None:
        x, a = self.x, self.account
        reshards = last or x.zero == 3
        c = x.compute_bytes
        if not (last or x.zero >= 2):  # no reduction: the gradient is kept whole, in fp32
            if group in self.sums:  # added to it
                a.free(*self.fresh(group))
            elif x.mixed:  # one by one
                a.free(*self.fresh(group))
                a.make(("sum", group), 4 * self.of(group, self.b.numel))
                a.touch(("gradient", "last"), c * self.last_numel(group))
            else:  # the gradient itself, to which the next is added in place
                a.free(*self.fresh(group))
                a.make(("sum", group), 4 * self.of(group, self.b.numel))
            self.sums.add(group)
            if reshards:
                self.reshard(group)
            return
        holding = c
        if group in self.sums:
            a.free(*self.fresh(group))
            holding = 4.0
        if reshards:
            self.reshard(group)
        if self.reading is not None:
            a.free(("reading", self.reading))
        a.make(("reading", group), 4 * self.of(group, self.b.padded))
        self.reading = group
        a.free(("sum", group), *self.fresh(group))
        self.sums.discard(group)
        if x.shards > 1:  # a loop's variable keeps the last gradient
            a.make(("last", group), holding * self.last_numel(group))
        a.make(("reduced", group), 4 * self.of(group, self.b.padded) / x.shards)
        a.free(("last", group))
        if group in self.sharded_grads:
            a.free(("reduced", group))
        else:
            a.free(("reduced", group))
            a.make(("sharded gradient", group), 4 * self.of(group, self.b.padded) / x.shards)
            self.sharded_grads.add(group)

    # -- the step

    def microbatch(self, last: bool) -> None:
        x, b, a = self.x, self.b, self.account
        if x.fsdp:
            a.now = "gather of the root"
            self.unshard(ROOT)
            self.wait(ROOT, True)
        for j in self.blocks:
            a.now = f"forward {j}"
            if x.fsdp and b.layer[j]:
                self.unshard(j)
                self.wait(j, True)
            if not b.layer[j] and self.layers and j > self.layers[-1]:
                self.forget()  # its most is at the loss, which is outside the model
            a.touch("work", float(b.forward[j]))
            a.make(("kept", j), float(b.kept[j]))
            if x.fsdp and b.layer[j] and x.zero == 3:
                self.reshard(j)
        self.forget()
        prefetched = not self.layers
        for j in reversed(self.blocks):
            a.now = f"backward {j}"
            if b.layer[j] and x.fsdp:
                self.unshard(j)
                self.wait(j, False)
                if j - 1 in self.layers:
                    self.unshard(j - 1)
            a.free(("kept", j))
            for i in self.blocks:
                if j == self.blocks[0] and b.tied[i]:  # a tied parameter's gradients meet: their sum is made, under a dispatch mode
                    a.make(("met", i), x.compute_bytes * float(b.tied[i]))
            a.touch("work", float(b.backward[j]))
            for i in self.blocks:
                if j == self.blocks[0] and b.tied[i]:
                    a.free(("met", i), ("tied", i))
            if b.tied[j]:  # waits for the other gradient of the same tensor, even where that is then added in place
                a.make(("tied", j), x.compute_bytes * float(b.tied[j]))
            if not x.fsdp:
                if ("gradient", j) not in a.held:
                    a.make(("gradient", j), 4 * float(b.numel[j]))
                continue
            if x.mixed or (j if b.layer[j] else ROOT) not in self.sums:  # else it is added in place
                a.make(("gradient", j), x.compute_bytes * float(b.numel[j]))
            if b.layer[j]:
                a.now = f"reduction {j}"
                a.make("carry", float(b.carry[j]))
                self.post_backward(j, last)
                a.free("carry")
            elif not prefetched:
                prefetched = True
                self.unshard(self.layers[-1])  # the root's hook, at the gradient of the model's output
        if x.fsdp:
            a.now = "reduction of the root"
            self.post_backward(ROOT, last)

    def run(self) -> Account:
        x, b, a = self.x, self.b, self.account
        a.make("parameters", float(4 * sum(b.padded) / x.shards + sum(b.buffers)))
        a.make("optimizer", float(8 * sum(b.padded) / x.shards))
        a.make("inputs", b.inputs)
        for i in range(x.microbatches):
            self.microbatch(i == x.microbatches - 1)
        return a
