"""Forked gloo ranks: torch and transformers are imported once, then each rank is a fork of this process."""

from __future__ import annotations

import multiprocessing as mp
import os
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
TIMEOUT_S = 90


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _rank(rank: int, world: int, port: int, fn: Callable[..., Any], args: tuple[Any, ...], results: Any) -> None:
    env = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in env.items()})
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    code = 1
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
        results.put((rank, True, fn(*args)))
        dist.barrier()
        code = 0
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    results.close()
    results.join_thread()
    os._exit(code)


def run(world: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """Runs fn(*args) on `world` forked ranks with a gloo group; returns their results by rank, raises what one raised."""
    context = mp.get_context("fork")
    results = context.Queue()
    port = _free_port()
    ranks = [context.Process(target=_rank, args=(r, world, port, fn, args, results)) for r in range(world)]
    for p in ranks:
        p.start()
    found: dict[int, Any] = {}
    started = time.monotonic()
    try:
        while len(found) < world:
            if time.monotonic() - started > TIMEOUT_S:
                raise TimeoutError(f"{len(found)} of {world} ranks answered in {TIMEOUT_S} s")
            try:
                rank, ok, value = results.get(timeout=0.2)
            except Exception:
                continue
            if not ok:
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            found[rank] = value
    finally:
        time.sleep(0.05)
        for p in ranks:
            p.join(timeout=2 if len(found) == world else 0)
            if p.is_alive():
                p.kill()
    return [found[r] for r in range(world)]
