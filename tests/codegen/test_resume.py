"""Emitted scripts that are killed: training goes on from the last whole checkpoint, on another layout, and the ranks that are left stop."""

from __future__ import annotations

import io
import json
import multiprocessing as mp
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meshwright.codegen.emit import emit
from meshwright.planner.plan import Plan
from meshwright.planner.solve import plan

ROOT = Path(__file__).parent.parent.parent
LLAMA = str(ROOT / "examples/models/tiny-llama.json")
RANKS, STEPS, EVERY = 4, 10, 3
LAYOUTS: dict[str, dict[str, Any]] = {
    "pp2-tp2": {"pp": 2, "tp": 2, "sp": True, "dp": 1, "micro_batch": 2, "schedule": "1f1b"},
    "fsdp4": {"dp": 4, "tp": 1, "pp": 1, "cp": 1, "zero": 3, "micro_batch": 1},
}
torch.set_num_threads(1)  # before any op: a forked child cannot use a parent's thread pool


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("scripts")
    for name, fix in LAYOUTS.items():
        made = plan(LLAMA, f"{RANKS}xcpu", global_batch=8, seq=16, precision="fp32", fix=fix)
        assert isinstance(made, Plan)
        emit(made, folder / name)
    return {name: folder / name for name in LAYOUTS}


def _rank(rank: int, world: int, port: int, folder: Path, args: list[str], before: Callable[[int], None] | None, out: Any) -> None:
    env = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in env.items()})
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    sys.argv, sys.path[0:0] = ["train.py", *args], [str(folder)]
    said, code = io.StringIO(), 1
    try:
        with redirect_stdout(said):
            import train  # type: ignore[import-not-found]

            if before is not None:
                before(rank)
            train.main()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
        said.write("" if isinstance(e.code, int) else str(e.code))
    except BaseException as e:
        said.write(f"{type(e).__name__}: {e}")
    out.send((code, said.getvalue()))
    out.close()
    os._exit(code)


def launch(folder: Path, *args: str, before: Callable[[int], None] | None = None, world: int = RANKS, seconds: float = 150) -> list[tuple[int, str]]:
    """Exit code and output of each forked rank of a script, -9 and nothing of one that was killed. `before(rank)` runs ahead of main."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    ranks = [context.Process(target=_rank, args=(r, world, port, folder, list(args), before, pipes[r][1])) for r in range(world)]
    for p in ranks:
        p.start()
    until = time.monotonic() + seconds
    found = []
    for p, (receive, send) in zip(ranks, pipes, strict=True):
        send.close()
        try:
            found.append(receive.recv() if receive.poll(max(until - time.monotonic(), 0)) else (None, "still running"))
        except EOFError:
            p.join(10)
            found.append((p.exitcode, ""))
    for p in ranks:
        p.kill()
    return found


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "step" in row}


def killed_in_second_checkpoint(rank: int) -> None:
    import runtime.checkpoint as checkpoint  # type: ignore[import-not-found]

    writer = checkpoint.dcp.FileSystemWriter
    write, times = writer.write_data, []

    def dying(self: Any, *args: Any, **kwargs: Any) -> Any:
        times.append(1)
        if rank == 2 and len(times) == 2:  # while the others write theirs
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, *args, **kwargs)

    writer.write_data = dying


def test_training_goes_on_from_the_last_whole_checkpoint(scripts: dict[str, Path], tmp_path: Path) -> None:
    """Killed in the middle of a checkpoint on PP2 x TP2 and started again on FSDP4, losses are those of a run that nothing stopped."""
    kept = tmp_path / "checkpoints"
    options = ("--steps", str(STEPS), "--save-every", str(EVERY), "--clip", "1.0")
    plain = launch(scripts["fsdp4"], *options)
    wanted = losses(scripts["fsdp4"])
    first = launch(scripts["pp2-tp2"], *options, "--checkpoints", str(kept), before=killed_in_second_checkpoint)
    before = losses(scripts["pp2-tp2"])
    left = sorted(p.name for p in kept.iterdir())
    second = launch(scripts["fsdp4"], *options, "--checkpoints", str(kept))
    after = losses(scripts["fsdp4"])

    assert [code for code, _ in plain] == [0] * RANKS, plain
    assert first[2][0] == -signal.SIGKILL
    assert all(code not in (0, None) for code, _ in first), first
    assert left[0] == f"step-{EVERY:06d}"
    assert all(name.endswith(".partial") for name in left[1:])
    assert [code for code, _ in second] == [0] * RANKS, second
    assert sorted(before) == list(range(2 * EVERY))
    assert sorted(after) == list(range(EVERY, STEPS))
    assert before == pytest.approx({i: wanted[i] for i in before}, rel=1e-5)
    assert after == pytest.approx({i: wanted[i] for i in after}, rel=1e-5)


def test_ranks_run_on_the_devices_of_the_plan(scripts: dict[str, Path], tmp_path: Path) -> None:
    """With a rank map, the process that torchrun starts on a device is the rank that the plan puts there; losses stay the same."""
    made = Plan.load(scripts["pp2-tp2"] / "plan.json")
    order = (2, 3, 1, 0)
    emit(made.model_copy(update={"solution": made.solution.model_copy(update={"rank_map": order})}), tmp_path / "mapped")
    plain = launch(scripts["pp2-tp2"], "--steps", "2")
    wanted = losses(scripts["pp2-tp2"])
    found = launch(tmp_path / "mapped", "--steps", "2")

    assert [code for code, _ in (*plain, *found)] == [0] * 2 * RANKS, found
    assert losses(tmp_path / "mapped") == pytest.approx(wanted, rel=1e-6)
    assert [i for i, (_, said) in enumerate(found) if "step 0" in said] == [order[0]]


def killed_in_third_step(rank: int) -> None:
    import train

    step = train.Trainer.step

    def dying(self: Any, i: int) -> Any:
        if rank == 1 and i == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, i)

    train.Trainer.step = dying


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_others_stop_and_say_who_is_gone(scripts: dict[str, Path], layout: str) -> None:
    """Where a rank is killed, every other one ends within a minute, and one sentence names it."""
    started = time.monotonic()
    found = launch(scripts[layout], "--steps", "50", before=killed_in_third_step)
    said = [line for _, text in found for line in text.splitlines() if "gone" in line]

    assert time.monotonic() - started < 100  # the start included
    assert [code for code, _ in found] == [1, -signal.SIGKILL, 1, 1]
    assert len(said) == 1, found
    assert said[0].startswith("rank 1 is gone, so the others stop: ")


def test_another_number_of_ranks_is_one_sentence(scripts: dict[str, Path]) -> None:
    """Started on two ranks, a script for four says so once."""
    found = launch(scripts["fsdp4"], world=2)

    assert found == [(1, "this script runs on 4 ranks, not 2: start it with launch.sh, or plan again for 2"), (1, "")]


def test_a_checkpoint_of_another_model_is_one_sentence(scripts: dict[str, Path], tmp_path: Path) -> None:
    """A checkpoint whose tensors differ is refused by the first rank alone, naming the first that differs."""
    made = plan(LLAMA, "1xcpu", global_batch=8, seq=16, precision="fp32")
    assert isinstance(made, Plan)
    config = json.loads(Path(LLAMA).read_text()) | {"intermediate_size": 96}
    other = tmp_path / "other.json"
    other.write_text(json.dumps(config))
    smaller = plan(str(other), "1xcpu", global_batch=8, seq=16, precision="fp32")
    assert isinstance(smaller, Plan)
    emit(smaller, tmp_path / "other")
    saved = launch(tmp_path / "other", "--steps", "1", "--checkpoints", str(tmp_path / "kept"), world=1)
    found = launch(scripts["fsdp4"], "--steps", "1", "--checkpoints", str(tmp_path / "kept"))
    said = [text for _, text in found if text]

    assert saved[0][0] == 0, saved
    assert len(said) == 1
    assert "is a checkpoint of another model" in said[0]
    assert len(said[0].splitlines()) == 1


@pytest.mark.parametrize(("tokens", "says"), [(None, "does not exist"), (5, "which is no sample of 16"), (10**5, "the model knows those below")])
def test_data_that_cannot_be_read_is_one_sentence(scripts: dict[str, Path], tmp_path: Path, tokens: int | None, says: str) -> None:
    """A data file that is missing, too short, or of another vocabulary is refused by the first rank alone."""
    file = tmp_path / "tokens.u32"
    if tokens is not None:
        np.full(5 if tokens < 10 else 1000, tokens, np.uint32).tofile(file)
    found = launch(scripts["fsdp4"], "--steps", "1", "--data", str(file))
    said = [text for _, text in found if text]

    assert all(code == 1 for code, _ in found), found
    assert len(said) == 1
    assert says in said[0]
    assert len(said[0].splitlines()) == 1


def test_weights_with_a_missing_tensor_are_one_sentence(scripts: dict[str, Path], tmp_path: Path) -> None:
    """Safetensors that lack a tensor of the model are refused by the first rank alone, naming it."""
    from safetensors.torch import save_file

    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    found = launch(scripts["fsdp4"], "--steps", "1", "--weights", str(tmp_path))
    said = [text for _, text in found if text]

    assert len(said) == 1
    assert "has no tensor" in said[0]
    assert len(said[0].splitlines()) == 1
