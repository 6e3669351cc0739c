"""Progress of a long measurement on stderr: a bar where rich and a terminal are there, else a line now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

Progress = Callable[[float, str], None]  # (share of the budget that is used, what was measured last)
LINE_EVERY_S = 10.0


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A Progress that draws on stderr."""
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (BarColumn(24), TextColumn("{task.percentage:3.0f}%"), TimeElapsedColumn(), TextColumn("{task.description}"))
            with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
                task = bars.add_task("starting", total=1.0)
                yield lambda share, what: bars.update(task, completed=min(share, 1.0), description=what)
            return
    last = -LINE_EVERY_S

    def say(share: float, what: str) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_EVERY_S:
            last = time.monotonic()
            print(f"{min(share, 1.0):4.0%} {what}", file=sys.stderr, flush=True)

    yield say
