"""emit: a Plan to a folder with a script that a person would have written, the runtime pieces it imports, and its launcher."""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path

from meshwright.codegen.kernels.emitted import files as kernel_files
from meshwright.codegen.kernels.planned import kernels_of
from meshwright.codegen.launch.torchrun import launcher, slurm
from meshwright.codegen.script import module_name, scripts
from meshwright.planner.plan import Plan
from meshwright.profiling.errors import InputError


def emit(plan: Plan, folder: str | Path) -> list[Path]:
    """Writes train.py, runtime/, launch.sh, slurm.sh, plan.json and what the model needs into `folder`; returns the files written.

    The folder appears whole or not at all; an existing one is replaced only if an earlier emit wrote it. Raises InputError if
    the plan's model cannot be written as code.
    """
    folder = Path(folder)
    parent = folder.absolute().parent
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "plan.json").exists())):
        raise InputError(f"{folder} exists and was not written by emit: name a new folder")
    if not parent.is_dir():
        raise InputError(f"the folder {parent} does not exist")
    scratch = Path(tempfile.mkdtemp(dir=parent, prefix=f".{folder.name}"))
    try:
        scratch.chmod(0o755)
        for name, text in scripts(plan).items():
            (scratch / name).write_text(text)
        for name, text in (("launch.sh", launcher(plan)), ("slurm.sh", slurm(plan))):
            (scratch / name).write_text(text)
            (scratch / name).chmod(0o755)
        (scratch / "plan.json").write_text(plan.to_json())
        _write_runtime(scratch / "runtime")
        for name, text in kernel_files(kernels_of(plan)).items():
            (scratch / "kernels").mkdir(exist_ok=True)
            (scratch / "kernels" / name).write_text(text)
        _write_model(plan, scratch)
        if folder.exists():
            shutil.rmtree(folder)
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _write_runtime(folder: Path) -> None:
    folder.mkdir()
    for item in (files("meshwright.codegen") / "runtime").iterdir():
        if item.name.endswith(".py"):
            (folder / item.name).write_text(item.read_text())


def _write_model(plan: Plan, folder: Path) -> None:
    if plan.model.origin == "hf":
        (folder / "config.json").write_text(json.dumps(plan.model.config, indent=2) + "\n")
        return
    where = plan.model.source.rpartition(":")[0]
    if where.endswith(".py"):
        if not Path(where).exists():
            raise InputError(f"{where}, which the plan names, does not exist: emit from where the plan was made")
        shutil.copy(where, folder / f"{module_name(where)}.py")
