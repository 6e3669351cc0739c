"""Forked gloo ranks: torch and transformers are imported once, then each rank is a fork of this process."""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import queue
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

torch.set_num_threads(1)  # before any op: a forked child cannot use a parent's thread pool
TIMEOUT_S = 180  # without a word from any rank
_say: Callable[[str], None] = lambda _: None  # noqa: E731


class RankError(RuntimeError):
    """A rank raised, or none answered in time. `doing` is what announce() was last told there."""

    def __init__(self, text: str, doing: str) -> None:
        super().__init__(f"{doing}: {text}" if doing else text)
        self.doing = doing


def announce(what: str) -> None:
    """On a rank: what it does from here on, named if it fails or hangs."""
    _say(what)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _rank(rank: int, world: int, port: int, fn: Callable[..., Any], args: tuple[Any, ...], results: Any) -> None:
    global _say
    env = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in env.items()})
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    gc.freeze()  # a collection need not walk, and so copy, what the fork shares with its parent
    code = 1
    _say = lambda what: results.put((rank, "doing", what))  # noqa: E731
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
        results.put((rank, "done", fn(*args)))
        dist.barrier()
        code = 0
    except BaseException:
        results.put((rank, "failed", traceback.format_exc()))
    results.close()
    results.join_thread()
    os._exit(code)


def run(world: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """Runs fn(*args) on `world` forked ranks with a gloo group; returns their results by rank. Raises RankError where one raised, or
    where all were silent for TIMEOUT_S; the ranks that are left are killed."""
    context = mp.get_context("fork")
    results = context.Queue()
    port = _free_port()
    ranks = [context.Process(target=_rank, args=(r, world, port, fn, args, results)) for r in range(world)]
    for p in ranks:
        p.start()
    found: dict[int, Any] = {}
    doing = dict.fromkeys(range(world), "")
    heard = time.monotonic()
    try:
        while len(found) < world:
            try:
                rank, event, value = results.get(timeout=0.2)
            except queue.Empty:
                silent = [r for r in range(world) if r not in found]
                for r in silent:
                    if (ranks[r].exitcode or 0) < 0:
                        raise RankError(f"rank {r} was killed by signal {-(ranks[r].exitcode or 0)}", doing[r]) from None
                if time.monotonic() - heard > TIMEOUT_S:
                    raise RankError(f"ranks {silent} did not answer within {TIMEOUT_S} s", doing[silent[0]]) from None
                continue
            heard = time.monotonic()
            if event == "doing":
                doing[rank] = value
            elif event == "failed":
                raise RankError(f"rank {rank} failed:\n{value}", doing[rank])
            else:
                found[rank] = value
    finally:
        for p in ranks:
            p.join(timeout=5 if len(found) == world else 0)
            if p.is_alive():
                p.kill()
    return [found[r] for r in range(world)]
