"""Files are written beside their place and renamed, so that nothing is ever half-written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from meshwright.profiling.errors import InputError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all. InputError if its folder does not exist or may not be written to."""
    path = path.resolve()  # what a link points to is written, and the link stays
    folder = path.parent
    if not folder.is_dir():
        raise InputError(f"the folder {path.parent} does not exist")
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a file")
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is a device or a pipe, not a file")
    data = content.encode() if isinstance(content, str) else content
    try:
        handle, name = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.")
    except OSError as e:
        raise InputError(f"{path} cannot be written: {e.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
