"""Starting and stopping a rank under torchrun: its device, the process group, and one sentence where something goes wrong."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from .shards import Refused

TIMEOUT = timedelta(seconds=60)  # of a collective: ranks stop when another has been gone for so long
ROLL_CALL_S, POLL_S = 10.0, 0.5
LOST = ("Connection closed", "Connection reset", "Timed out", "timed out", "Broken pipe")  # what gloo says of a rank that is gone


def start(ranks: int, order: Sequence[int] = ()) -> torch.device:
    """Joins the process group that torchrun describes, which must have `ranks` ranks; returns this process's device.

    `order`: the device of each rank, where ranks are not numbered as the devices are.
    """
    here, found = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if found != ranks:
        _stop(f"this script runs on {ranks} ranks, not {found}: start it with launch.sh, or plan again for {found}")
    cuda = torch.cuda.is_available()
    if cuda and not dist.is_nccl_available():
        _stop("this torch has CUDA but no NCCL, which GPUs talk through: install a build of torch with NCCL")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and local >= torch.cuda.device_count():
        _stop(f"this node has {torch.cuda.device_count()} GPUs, and torchrun started rank {local} of it: lower --nproc-per-node")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    rank = list(order).index(here) if order else here
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=ranks, timeout=TIMEOUT)
    return device


@contextlib.contextmanager
def stopping_together() -> Iterator[None]:
    """Ends the process group; where a rank fails or is gone, the others stop within a minute, and one of them says who."""
    watch = _Watch()
    watch.start()
    try:
        yield
    except Refused as e:
        watch.stop()
        raise SystemExit(str(e) if dist.get_rank() == 0 else 1) from None
    except RuntimeError as e:
        causes = _causes(e)
        reason = next((str(c) for c in causes if isinstance(c, dist.DistError) or any(word in str(c) for word in LOST)), "")
        if not reason:
            raise
        watch.say_who_is_gone(reason.splitlines()[0])
        raise SystemExit(1) from None
    watch.stop()
    dist.destroy_process_group()


def _causes(error: BaseException) -> list[BaseException]:
    """What caused an exception, first; it comes last itself."""
    found = [error]
    while (cause := found[0].__cause__ or found[0].__context__) is not None and cause not in found:
        found.insert(0, cause)
    return found


class _Watch(threading.Thread):
    """Asks the store whether a rank has lost another, answers that this one is there, and ends the process, even if it waits for the lost one."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.rank, self.ranks, self.left = dist.get_rank(), dist.get_world_size(), threading.Event()
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = dist.TCPStore(address, port, is_master=False, timeout=TIMEOUT) if self.ranks > 1 else dist.HashStore()

    def run(self) -> None:
        try:
            while not self.left.wait(POLL_S):
                if self.store.check(["stopping"]):
                    self.store.set(f"here/{self.rank}", "1")
                    until = time.monotonic() + ROLL_CALL_S + POLL_S
                    while time.monotonic() < until and not self.store.check(["said"]) and not self.left.wait(POLL_S / 5):
                        pass
                    break
            else:
                return
        except RuntimeError:
            if not self.left.is_set() and self.rank == 1:
                print("rank 0, which keeps the ranks' address book, is gone, so the others stop", flush=True)
        if not self.left.is_set():
            sys.stdout.flush()
            os._exit(1)

    def stop(self) -> None:
        """Ends the watch; a thread that is in the store when the interpreter ends would abort it."""
        self.left.set()
        self.join()

    def say_who_is_gone(self, reason: str) -> None:
        """The first rank to notice calls the roll and tells who did not answer."""
        try:
            if self.store.compare_set("stopping", "", str(self.rank)) != str(self.rank).encode():
                self.left.wait(ROLL_CALL_S + POLL_S)
                return
            here, until = {self.rank}, time.monotonic() + ROLL_CALL_S
            while time.monotonic() < until and len(here) < self.ranks - 1:
                here |= {r for r in range(self.ranks) if self.store.check([f"here/{r}"])}
                time.sleep(POLL_S / 5)
        except RuntimeError:
            return  # without the store, the watch of rank 1 says so
        gone = [r for r in range(self.ranks) if r not in here]
        who = f"rank {gone[0]} is" if len(gone) == 1 else f"ranks {', '.join(map(str, gone))} are"
        self.left.set()
        print(f"{who} gone, so the others stop: {reason}", flush=True)
        with contextlib.suppress(RuntimeError):
            self.store.set("said", "1")
            time.sleep(2 * POLL_S)  # the store may be this rank's: the others read it first
        self.join()


def _stop(sentence: str) -> None:
    """Ends every process; the first says why."""
    raise SystemExit(sentence if int(os.environ.get("RANK", "0")) == 0 else 1)
