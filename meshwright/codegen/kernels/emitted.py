"""The kernels of a plan as a folder beside an emitted script: one file each, and an __init__ that puts them into a model.

The folder imports torch and triton alone. It has the kernels that stand in a module's own forward and the loss; residual additions and
rotary embeddings, which the script's model computes in code of its own, stay eager there.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from meshwright.codegen.kernels import vocab_parallel
from meshwright.codegen.kernels.choose import VOCAB_PARALLEL, Kernel
from meshwright.codegen.kernels.generate import generate
from meshwright.codegen.kernels.install import module_text
from meshwright.codegen.kernels.recipe import Recipe

_HEAD = '''"""The kernels of this plan, and the modules that run them. install() comes before tensor parallelism, recompute and FSDP."""

import types

from torch import nn
'''
_INSTALL = '''
def install(model: nn.Module) -> None:
    """Puts the kernels into the modules of this stage."""
    held = dict(model.named_modules())
    for forward, paths in FORWARDS.items():
        for path in paths:
            if path in held and not isinstance(held[path], nn.Identity):
                held[path].forward = types.MethodType(forward, held[path])
'''


def files(kernels: Iterable[Kernel]) -> dict[str, str]:
    """Names and texts of the files of a kernels/ folder; empty where no kernel can stand there."""
    made: dict[str, str] = {}
    imports: dict[str, Recipe] = {}
    forwards: list[str] = []
    table: list[str] = []
    for k in kernels:
        if k.kind == VOCAB_PARALLEL:
            made["vocab_parallel.py"] = Path(vocab_parallel.__file__).read_text()
        if k.region is None or k.region.place != "module" or any(len(u.gives) != 1 for u in k.region.uses):
            continue
        text, functions = module_text(k.region, k.region.argument)
        for name, recipe in functions.items():
            imports[recipe.name] = recipe
            text = text.replace(f" {name}(", f" {recipe.name}(")
        name = f"forward_{len(table)}"
        forwards.append(text.replace("def forward(", f"def {name}("))
        table.append(f"    {name}: (\n" + "".join(f'        "{path}",\n' for path in k.modules) + "    ),")
    made |= {f"{name}.py": generate(recipe) for name, recipe in imports.items()}
    if not made:
        return {}
    said = "".join(f"from .{name} import {r.label} as {name}\n" for name, r in sorted(imports.items()))
    body = "\n".join([*(f"\n{text}" for text in forwards), "", "FORWARDS = {", *table, "}", _INSTALL])
    return {"__init__.py": f"{_HEAD}\n{said}{body}", **made}
