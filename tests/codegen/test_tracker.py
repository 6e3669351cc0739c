"""The storage tracker: what counts, for how long, and as what."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

from meshwright.codegen.tracker import Tracker

KIB = 1024


def kib(n: int) -> Tensor:
    return torch.zeros(n * KIB // 4)


def test_views_count_once() -> None:
    """A storage counts once, whatever views share it, and until the last of them is gone."""
    with Tracker() as tracker:
        x = kib(4)
        y = x.view(32, 32).t()[:8]
        assert tracker.live_bytes == 4 * KIB
        del x
        assert tracker.live_bytes == 4 * KIB
        del y
        assert tracker.live_bytes == 0
    assert tracker.peak().live_bytes == 4 * KIB


def test_a_storage_resized_counts_with_the_size_that_it_has() -> None:
    """What FSDP frees and fills by resizing a storage is gone and back, under its own category."""
    with Tracker() as tracker:
        x = kib(4)
        x.untyped_storage().resize_(0)
        assert tracker.live_bytes == 0
        x.untyped_storage().resize_(8 * KIB)
        assert tracker.live_bytes == 8 * KIB
    assert tracker.by_category([tracker.peak().time]) == [{"gathered": 8 * KIB}]


def test_what_was_there_before_counts_only_if_told() -> None:
    """An operator that passes on a tensor from before makes nothing; telling takes it up."""
    x = kib(4)
    with Tracker() as tracker:
        x.add_(1)
        y = x.view(-1)
        assert tracker.live_bytes == 0
        tracker.tell("inputs", [y])
        assert tracker.live_bytes == 4 * KIB
        assert torch.tensor([1.0, 2.0]).shape == (2,)
    assert tracker.peak().live_bytes == 4 * KIB + 8


def test_categories_of_a_program_with_known_bytes() -> None:
    """A linear layer of 4 KiB with a ReLU of 2 KiB: parameters, input, what forward keeps, gradients; each of known size."""
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 32, bias=False))
    x = torch.ones(16, 32)  # 2 KiB, as is every activation
    tracker = Tracker()
    tracker.tell("parameters", list(model.parameters()))
    tracker.tell("inputs", [x])
    tracker.watch(model)
    with tracker:
        loss = model(x).sum()
        before = tracker.live_bytes
        loss.backward()
        tracker.tell("gradients", [p.grad for p in model.parameters()])
        after = tracker._time
    by_moment = tracker.by_category([tracker.peaks["forward", "2"].time, after])

    # sum reads the output and lets it go; the first product's output is the ReLU's input, which keeps its own output alone
    assert by_moment[0] == {"parameters": 8 * KIB, "inputs": 2 * KIB, "activations": 2 * KIB, "temporaries": 2 * KIB}
    assert before == 8 * KIB + 2 * KIB + 2 * KIB + 4
    assert by_moment[1] == {"parameters": 8 * KIB, "inputs": 2 * KIB, "gradients": 8 * KIB, "activations": 4}
    assert {m.phase for m in tracker.peaks.values()} == {"forward", "step", "backward"}


def test_a_dtensor_counts_by_its_local_part() -> None:
    """Operators on a DTensor count a rank's share, not the full shape that sharding propagation works on."""
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (8,))
        x = DTensor.from_local(torch.ones(2, 64), mesh, [Shard(0)], run_check=False)  # 16 x 64 over 8 ranks
        with Tracker() as tracker:
            y = x * 3 + 1
            assert tuple(y.shape) == (16, 64)
            assert tracker.live_bytes == 2 * 64 * 4
        assert tracker.peak().live_bytes == 2 * 2 * 64 * 4
    finally:
        dist.destroy_process_group()


def test_restart_forgets_peaks_and_keeps_storages() -> None:
    """After a restart the peak is that of what follows, over what is still alive."""
    with Tracker() as tracker:
        kept, large = kib(1), kib(64)
        del large
        tracker.restart()
        more = kib(2)
    assert tracker.peak().live_bytes == 3 * KIB
    assert (kept.numel(), more.numel()) == (256, 512)


def test_a_moment_says_where_it_is() -> None:
    """A forward allocation has its module and the line that made it; a backward one the module and autograd's node."""

    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.exp(x)

    model = nn.Sequential(nn.Identity(), Wide())
    x = torch.zeros(1 << 19, requires_grad=True)  # 2 MiB
    tracker = Tracker()
    tracker.watch(model)
    with tracker:
        model(x).sum().backward()
    forward, backward = tracker.peaks["forward", "1"], tracker.peaks["backward", "1"]

    assert (forward.op, forward.site.rpartition(":")[0]) == ("aten.exp.default", "tests/codegen/test_tracker.py")
    assert (backward.op, backward.site) == ("aten.mul.Tensor", "ExpBackward0")


def test_a_refused_operator_is_kept_with_its_shapes() -> None:
    """What raised is known afterwards: operator, module and shapes."""
    model = nn.Sequential(nn.Linear(4, 4))
    tracker = Tracker()
    tracker.watch(model)
    with pytest.raises(RuntimeError) as refused, tracker:
        model(torch.ones(2, 3))

    assert tracker.failure is not None
    assert tracker.failure.error is refused.value
    assert (tracker.failure.module, tracker.failure.shapes[1:]) == ("0", ((2, 3), (4, 4)))


def test_collectives_are_counted_by_group_and_size() -> None:
    """A collective is one row per operator, group, size and phase, with its calls."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        with Tracker(lambda name: ("all", 4)) as tracker:
            for _ in range(3):
                dist.all_reduce(torch.ones(256))
        [found] = tracker.collectives.values()
        assert (found.op, found.group, found.ranks, found.nbytes, found.phase, found.count) == ("allreduce", "all", 4, KIB, "step", 3)
    finally:
        dist.destroy_process_group()


def test_the_loss_keeps_what_backward_reads() -> None:
    """The softmax that a cross-entropy keeps is an activation, in fp32, of the logits' size."""
    logits = torch.zeros(8, 128, requires_grad=True)
    with Tracker() as tracker:
        loss = F.cross_entropy(logits, torch.zeros(8, dtype=torch.long))
        alive = tracker._time
        loss.backward()
    assert tracker.by_category([alive])[0]["activations"] >= 8 * 128 * 4
