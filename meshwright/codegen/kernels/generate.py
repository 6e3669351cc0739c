"""From a Recipe to one Triton file: forward and backward kernels, and the custom ops that autograd, export and DTensor know.

What is printed depends on nothing but the recipe, and imports torch and triton alone. The backward is derived (algebra.py), and sums
over rows go by partial sums of a fixed number of programs, without atomics, so that two runs give equal bits.
"""

from __future__ import annotations

import textwrap

from meshwright.codegen.kernels.kerneltext import Names, kernel
from meshwright.codegen.kernels.layout import rows_of
from meshwright.codegen.kernels.lowering import Lowered, lower
from meshwright.codegen.kernels.optext import LINE, backward_op, formula, forward_op, helpers, public, sharding
from meshwright.codegen.kernels.recipe import Input, Recipe
from meshwright.profiling.graph import DTYPE_BYTES

SAYS = {
    "inputs": "its inputs; backward computes the rest again",
    "statistics": "the values of fewest bytes from which backward follows, and what each row was reduced to",
    "all": "every value that backward reads",
}


def traffic(recipe: Recipe) -> tuple[int, int]:
    """Bytes through device memory of one sample, forward and backward: each tensor once. Weights are left out: they do not grow."""
    low = lower(recipe)
    size = {x.name: recipe.bytes_of(x) for x in recipe.inputs if x.over == "rows"}
    size |= {o.value: recipe.rows * recipe.width * DTYPE_BYTES[o.dtype] for o in recipe.outputs}
    out = sum(size[o.value] for o in recipe.outputs)
    tile = recipe.width // recipe.parts * DTYPE_BYTES[recipe.dtype]
    stored = sum(recipe.rows * (4 if low.algebra.nodes[n].kind == "row" else tile) for n in low.stored)
    read = sum(size.get(name, 0) for name in (*low.kept_inputs, *low.kept_outputs)) + stored
    return sum(size[x.name] for x in recipe.inputs if x.over == "rows") + out + stored, out + read + sum(size.get(n, 0) for n in low.gradients)


def generate(recipe: Recipe) -> str:
    """The text of a recipe's file. ValueError where a step cannot be generated, with the reason."""
    low, rows = lower(recipe), rows_of(recipe)
    calls = Names(low)
    parts = [
        _docstring(low),
        "import torch\nimport triton\nimport triton.language as tl\nfrom torch import Tensor\n"
        "from torch._subclasses import FakeTensor\n"
        f"from torch.distributed.tensor import {'Partial, ' if calls.columns else ''}Replicate, Shard\n"
        "from torch.distributed.tensor.experimental import register_sharding",
        'INTERPRETED = type(tl.sum).__name__ == "InterpretedFunction"  # TRITON_INTERPRET=1 before torch was imported',
    ]
    body = [kernel(low, rows, backward=False)]
    body += [kernel(low, rows, backward=True)] if low.gradients else []
    if any("_tanh(" in text for text in body):
        body.insert(0, "@triton.jit\ndef _tanh(x):\n    return 2.0 * tl.sigmoid(2.0 * x) - 1.0")
    body += [helpers(low, rows), forward_op(low, rows, calls)]
    body += [backward_op(low, rows, calls)] if low.gradients else []
    body += [sharding(calls), formula(recipe), public(low, rows)]
    return "\n\n".join(parts) + "\n\n\n" + "\n\n\n".join(body) + "\n"


def _docstring(low: Lowered) -> str:
    r = low.recipe
    forward, backward = traffic(r)
    said = [f"{r.label.replace('_', ' ')} of rows of {r.width}, in {r.dtype}; arithmetic in fp32."]
    said += ["", *(f"    {line}" for line in r.formula()), ""]
    shapes = ", ".join(f"{x.name} {_shape(x)} {x.dtype}" for x in r.inputs)
    said += textwrap.wrap(f"Takes {shapes}. Dimensions are those of one rank; the first is the batch.", LINE)
    keeps = ", ".join((*low.kept_inputs, *low.kept_outputs)) or "nothing of them"
    stored = f"; stores {low.saved_bytes:,} bytes a sample in all" if low.saved_bytes else ""
    said += textwrap.wrap(f'For backward it keeps ("{r.save}") {SAYS[r.save]}: {keeps}{_beside(low)}{stored}.', LINE)
    said += textwrap.wrap(f"Moves {forward:,} bytes a sample in forward and {backward:,} in backward, each tensor once.", LINE)
    return '"""' + "\n".join(said) + '\n"""'


def _beside(low: Lowered) -> str:
    kinds = [low.algebra.nodes[n].kind for n in low.stored]
    rows, full = kinds.count("row"), len(kinds) - kinds.count("row")
    said = [f"{rows} number{'s' * (rows > 1)} a row" if rows else "", f"{full} tile{'s' * (full > 1)}" if full else ""]
    return "".join(f", {s}" for s in said if s)


def _shape(x: Input) -> str:
    first = ["B"] if x.over == "rows" and x.batched else []
    return "[" + ", ".join([*first, *(str(n) for n in x.shape[len(first) :])]) + "]"
