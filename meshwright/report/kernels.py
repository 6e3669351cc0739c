"""The kernels of a plan as text of at most 100 columns: what each computes, where it runs, what it saves; and its source."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from meshwright.codegen.kernels import vocab_parallel
from meshwright.codegen.kernels.choose import VOCAB_PARALLEL, Kernel
from meshwright.codegen.kernels.generate import generate
from meshwright.profiling.errors import InputError
from meshwright.report.terminal import WIDTH, _hanging, _table, _text, gib


def render_kernels(kernels: Sequence[Kernel]) -> str:
    """The answer, a table of the kernels, and each one's formula, modules and what it keeps. Seconds and bytes of one microbatch."""
    if not kernels:
        return "No kernels: the cost model prices none below eager code for this layout"
    saved = sum(k.gain_s for k in kernels)
    freed = -sum(k.saved_change_bytes * len(k.modules) for k in kernels)
    where = sum(len(k.modules) for k in kernels)
    first = (
        f"{len(kernels)} in {where} modules; a microbatch of all layers is predicted to take {saved * 1e3:.3g} ms less than in eager code and "
        f"to keep {gib(freed)} less for backward"
    )
    table = _table(("kernel", "left"), ("modules", "right"), ("eager", "right"), ("fused", "right"), ("moves", "right"), ("of eager", "right"))
    for k in kernels:
        share = k.fused_bytes / k.eager_bytes if k.eager_bytes else 1.0
        row = (_short(k), str(len(k.modules)), _us(k.eager_s), _us(k.fused_s), f"{k.fused_bytes / 2**20:,.1f} MiB", f"{share:.0%}")
        table.add_row(*row)
    lines = [*textwrap.wrap(first, WIDTH, initial_indent="Kernels  ", subsequent_indent=" " * 9), _text(table)]
    for k in kernels:
        lines += ["", _short(k)]
        for formula in k.formula:
            lines += textwrap.wrap(formula, WIDTH, initial_indent="  ", subsequent_indent="      ", break_long_words=False)
        lines += _hanging("in", _modules(k))
        lines += _hanging("shapes", "; ".join(f"{n.rpartition('.')[2]} {list(s)}" for n, s in k.shapes.items()) + f", {k.dtype}")
        kept = ", ".join(f'"{name}" {gib(b)}' for name, b in k.saved_bytes.items())
        lines += _hanging("keeps", f'"{k.save}", of {kept}' if len(k.saved_bytes) > 1 else f"the logits, {kept.rpartition(' ')[0].split()[-1]} "
                          f"{kept.rpartition(' ')[2]}, and writes the gradient over them")  # fmt: skip
        names = ", ".join(_names(k))
        lines += _hanging("source", f"--source {names}")
    return "\n".join(lines)


def render_source(kernels: Sequence[Kernel], name: str) -> str:
    """The file of one kernel, by its name or the beginning of it. InputError if there is no such kernel, or several."""
    known: dict[str, str] = {}
    for k in kernels:
        if k.region is not None:
            known |= {u.recipe.name: generate(u.recipe) for u in k.region.uses}
        elif k.kind == VOCAB_PARALLEL:
            known[k.name] = Path(vocab_parallel.__file__).read_text()
    found = [name] if name in known else [n for n in known if n.startswith(name)]
    if len(found) != 1:
        which = f"{name!r} begins {len(found)} kernels" if found else f"the plan has no kernel {name!r}"
        raise InputError(f"{which}: its kernels are {', '.join(sorted(known)) or 'none'}")
    return known[found[0]]


def _names(k: Kernel) -> list[str]:
    return list(dict.fromkeys(k.name.split("+")))


def _short(k: Kernel) -> str:
    """Names without digits that only tell recipes apart: "rope_128 x2"."""
    names = [n.rpartition("_")[0] if k.region is not None else n for n in _names(k)]
    unique = list(dict.fromkeys(names))
    return " + ".join(f"{n} x{names.count(n)}" if names.count(n) > 1 else n for n in unique)


def _modules(k: Kernel) -> str:
    """The modules, those that differ in one number once: "model.layers.0-31.mlp"."""
    groups: dict[str, list[int]] = {}
    for path in k.modules:
        parts = path.split(".")
        at = next((i for i, p in enumerate(parts) if p.isdigit()), None)
        key = path if at is None else ".".join([*parts[:at], "{}", *parts[at + 1 :]])
        groups.setdefault(key, []).append(-1 if at is None else int(parts[at]))
    said = []
    for key, numbers in groups.items():
        whole = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        text = f"{numbers[0]}-{numbers[-1]}" if whole and len(numbers) > 1 else ",".join(str(n) for n in numbers)
        said.append(key.replace("{}", text) if key else "the loss")
    return ", ".join(said)


def _us(s: float) -> str:
    return f"{s * 1e6:,.0f} us"
