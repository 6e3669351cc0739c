"""Kernel files as modules: text is written once under its own hash, and imported from there (Triton reads a kernel's source file)."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from meshwright.codegen.kernels.generate import generate
from meshwright.codegen.kernels.recipe import Recipe
from meshwright.profiling.files import write_atomically


def cache_folder() -> Path:
    """Where generated files lie: $XDG_CACHE_HOME/meshwright/kernels, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meshwright" / "kernels"


@functools.cache
def load(recipe: Recipe) -> ModuleType:
    """The module of a recipe's generated file; its public function is named as the recipe's label."""
    text = generate(recipe)
    name = f"{recipe.name}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    path = cache_folder() / f"{name}.py"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    spec = importlib.util.spec_from_file_location(f"meshwright_kernels_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
