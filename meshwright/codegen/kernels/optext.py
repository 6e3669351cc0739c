"""The text around the kernels of a recipe: custom ops with fake, autograd and sharding rules, the formula in torch, the public function."""

from __future__ import annotations

from meshwright.codegen.kernels.kerneltext import Names, tiles
from meshwright.codegen.kernels.layout import PROGRAMS, Rows, Tile
from meshwright.codegen.kernels.lowering import Lowered
from meshwright.codegen.kernels.recipe import BINARY, Recipe

NAMESPACE = "meshwright_kernels"
LINE = 118


def _tuple(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names)


def _returns(n: int) -> str:
    return "Tensor" if n == 1 else f"tuple[{', '.join(['Tensor'] * n)}]"


def helpers(low: Lowered, rows: Rows) -> str:
    """How a tensor comes to lie as the kernel reads it."""
    if rows.single:
        return (
            "def _laid(x: Tensor) -> Tensor:\n"
            '    """x with rows one after another; a copy where they lie otherwise."""\n'
            "    return x.contiguous()"
        )  # fmt: skip
    return (
        "def _laid(x: Tensor, strides: tuple[int, ...]) -> Tensor:\n"
        '    """x with the strides that the kernel reads; a copy where it has others."""\n'
        "    if all(n == 1 or a == b for n, a, b in zip(x.shape, x.stride(), strides)):\n"
        "        return x\n"
        "    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)"
    )


def _new(rows: Rows, like: str, width: int, dtype: str, strides: tuple[int, ...]) -> str:
    shape = f"(*{like}.shape[:-1], {width})"
    kind = f"dtype=torch.{dtype}"
    return f"{like}.new_empty({shape}, {kind})" if rows.single else f"{like}.new_empty_strided({shape}, {strides}, {kind})"


def forward_op(low: Lowered, rows: Rows, names: Names) -> str:
    """The forward op, and its outputs without data."""
    r = low.recipe
    first = next(x.name for x in r.inputs if x.over == "rows" and len(x.shape) == len(r.shape) and x.shape == r.shape)
    made = [f"    {o.value} = {_new(rows, first, r.width, o.dtype, o.strides)}" for o in r.outputs]
    for name, n in zip(names.stored, low.stored):
        row = low.algebra.nodes[n].kind == "row"
        size, dtype = (1, "float32") if row else (r.width // r.parts, r.dtype)
        made.append(f"    {name} = {first}.new_empty(({first}.numel() // {r.width}, {size}), dtype=torch.{dtype})")
    out = [*names.outputs, *names.stored]
    t, _ = tiles(low, False)
    takes = ", ".join(f"{n}: Tensor" for n in names.inputs)
    laid = [f"{x.name} = {_laid(rows, x.name, x.strides)}" for x in r.inputs if x.over == "rows"]
    laid += [f"{x.name} = {x.name}.contiguous()" for x in r.inputs if x.over == "columns"]
    lines = [
        f"def _outputs({first}: Tensor) -> {_returns(len(out))}:", *made, f"    return {_tuple(out)}", "", "",
        f'@torch.library.custom_op("{NAMESPACE}::{names.name}", mutates_args=())', f"def forward({takes}) -> {_returns(len(out))}:",
        *(f"    {line}" for line in laid), f"    {_tuple(out)} = _outputs({first})", f"    rows = {first}.numel() // {r.width}",
        f"    _forward_kernel[{_grid(t, False)}](", f"        {', '.join([*names.inputs, *out])}, rows, num_warps={t.warps}", "    )",
        f"    return {_tuple(out)}", "", "", "@forward.register_fake", f"def _({takes}) -> {_returns(len(out))}:", f"    return _outputs({first})",
    ]  # fmt: skip
    return "\n".join(lines)


def _laid(rows: Rows, name: str, strides: tuple[int, ...]) -> str:
    return f"_laid({name})" if rows.single else f"_laid({name}, {strides})"


def _grid(t: Tile, looped: bool) -> str:
    if looped:
        return f"(min({PROGRAMS}, triton.cdiv(rows, {t.rows})),)"
    first = f"triton.cdiv(rows, {t.rows})"
    return f"({first},)" if t.whole else f"({first}, {-(-t.width // t.columns)})"


def backward_op(low: Lowered, rows: Rows, names: Names) -> str:
    """The backward op, and what autograd calls."""
    r = low.recipe
    t, looped = tiles(low, True)
    grad = names.grads[0]
    takes = ", ".join(f"{n}: Tensor" for n in [*names.grads, *names.kept])
    wanted = [x for x in r.inputs if x.name in low.gradients]
    laid = [f"{g} = {_laid(rows, g, o.strides)}" for g, o in zip(names.grads, r.outputs)]
    laid += [f"{x.name} = {_laid(rows, x.name, x.strides)}" for x in r.inputs if x.over == "rows" and x.name in low.kept_inputs]
    laid += [f"{x.name} = {x.name}.contiguous()" for x in r.inputs if x.over == "columns" and x.name in low.kept_inputs]
    made, fake, out = [], [], []
    for x in wanted:
        if x.over == "rows":
            made.append(f"{x.name}_grad = {_new(rows, grad, x.shape[-1], x.dtype, x.strides)}")
            fake.append(f"{_new(rows, grad, x.shape[-1], x.dtype, x.strides)}")
            out.append(f"{x.name}_grad")
        else:
            programs = f"min({PROGRAMS}, triton.cdiv(rows, {t.rows}))"
            made.append(f"{x.name}_grad = {grad}.new_empty(({programs}, {r.width}), dtype=torch.float32)")
            fake.append(f"{grad}.new_empty(({r.width},), dtype=torch.{x.dtype})")
            out.append(f"{x.name}_grad.sum(0).to(torch.{x.dtype})")
    lines = [
        f'@torch.library.custom_op("{NAMESPACE}::{names.name}_backward", mutates_args=())', f"def backward({takes}) -> {_returns(len(out))}:",
        *(f"    {line}" for line in laid), f"    rows = {grad}.numel() // {r.width}", *(f"    {line}" for line in made),
        f"    _backward_kernel[{_grid(t, looped)}](",
        f"        {', '.join([*names.grads, *names.kept, *(f'{x.name}_grad' for x in wanted)])}, rows, num_warps={t.warps}", "    )",
        f"    return {_tuple(out)}", "", "", "@backward.register_fake", f"def _({takes}) -> {_returns(len(out))}:",
        *(["    return ("] + [f"        {line}," for line in fake] + ["    )"] if len(fake) > 1 else [f"    return {fake[0]}"]),
        "", "", "def _setup(ctx, inputs, output) -> None:", f"    {', '.join(names.inputs)}{',' * (len(names.inputs) == 1)} = inputs",
        f"    {_tuple([*names.outputs, *names.stored])} = output", f"    ctx.save_for_backward({', '.join(names.kept)})",
        *(["    ctx.set_materialize_grads(False)"] if len(names.grads) > 1 else []), "", "",
        f"def _backward(ctx, {', '.join([*names.grads, *('_' for _ in names.stored[:1]), *(f'_{i}' for i in range(1, len(names.stored)))])}):",
    ]  # fmt: skip
    if len(names.grads) > 1:  # zeros that autograd makes are no DTensors
        lines.append(f"    known = next(g for g in ({', '.join(names.grads)}) if g is not None)")
        lines += [f"    {g} = torch.zeros_like(known) if {g} is None else {g}" for g in names.grads]
    given = ", ".join([*names.grads, "*ctx.saved_tensors"])
    back = [f"{n}_grad" if n in low.gradients else "None" for n in names.inputs]
    lines += [f"    {_tuple([f'{x.name}_grad' for x in wanted])} = backward({given})", f"    return {_tuple(back)}", "", ""]
    lines.append("forward.register_autograd(_backward, setup_context=_setup)")
    return "\n".join(lines)


def sharding(names: Names) -> str:
    """DTensor rules: whole tensors, or samples sharded over the batch; a weight's gradient is then a partial sum."""
    rows = dict.fromkeys((*names.inputs, *names.outputs, *names.stored, *names.grads), "Shard(0)")
    rows |= dict.fromkeys(names.shared, "Replicate()")

    def rule(op: str, takes: list[str], gives: list[str], partial: set[str]) -> list[str]:
        whole = f"([{', '.join(['Replicate()'] * len(gives))}], [{', '.join(['Replicate()'] * len(takes))}])"
        out = ", ".join("Partial()" if n in partial else "Shard(0)" for n in gives)
        batch = f"([{out}], [{', '.join(rows[n] for n in takes)}])"
        return [
            f"@register_sharding(torch.ops.{NAMESPACE}.{op}.default)", f"def _({', '.join(takes)}):", "    return [", f"        {whole},",
            f"        {batch},", "    ]",
        ]  # fmt: skip

    lines = rule(names.name, names.inputs, [*names.outputs, *names.stored], set())
    if names.wanted:
        lines += ["", "", *rule(f"{names.name}_backward", [*names.grads, *names.kept], names.wanted, set(names.columns))]
    return "\n".join(lines)


def formula(recipe: Recipe) -> str:
    """The recipe in eager torch."""
    lines = [f"def formula({', '.join(f'{x.name}: Tensor' for x in recipe.inputs)}) -> {_returns(len(recipe.outputs))}:"]
    lines.append('    """The same in eager torch, for where no kernel runs."""')
    lines += [f"    {x.name} = {x.name}.float()" for x in recipe.inputs]
    for s in recipe.steps:
        a = [x if isinstance(x, str) else repr(x) for x in s.args]
        said = f"{a[0]} {BINARY[s.op]} {a[1]}" if s.op in BINARY else _TORCH[s.op].format(*a, half=recipe.width // 2)
        if said != s.name:
            lines.append(f"    {s.name} = {said}")
    lines.append(f"    return {_tuple([f'{o.value}.to(torch.{o.dtype})' for o in recipe.outputs])}")
    return "\n".join(lines)


_TORCH = {
    "cast": "{0}", "neg": "-{0}", "pow": "{0} ** {1}", "sum": "{0}.sum(-1, keepdim=True)", "mean": "{0}.mean(-1, keepdim=True)",
    "low": "{0}[..., :{half}]", "high": "{0}[..., {half}:]", "cat": "torch.cat(({0}, {1}), -1)", "silu": "torch.nn.functional.silu({0})",
    "gelu": "torch.nn.functional.gelu({0})", "gelu_tanh": 'torch.nn.functional.gelu({0}, approximate="tanh")',
} | {op: f"torch.{op}({{0}})" for op in ("rsqrt", "sqrt", "exp", "log", "sigmoid", "tanh", "erf", "relu")}  # fmt: skip


def public(low: Lowered, rows: Rows) -> str:
    """The function that models call."""
    r = low.recipe
    names = ", ".join(x.name for x in r.inputs)
    first = next(x.name for x in r.inputs if x.shape == r.shape and x.over == "rows")
    fits = f"{first}.shape[-1] == {r.width}" if rows.single else f"{first}.shape[1:] == {tuple(r.shape[1:])}"
    fits += "".join(f" and {x.name}.shape == {x.shape}" for x in r.inputs if x.over == "rows" and not x.batched)
    out = f"forward({names})" if not low.stored else f"forward({names})[{0 if len(r.outputs) == 1 else f':{len(r.outputs)}'}]"
    return "\n".join(
        [
            f"def {r.label}({', '.join(f'{x.name}: Tensor' for x in r.inputs)}) -> {_returns(len(r.outputs))}:",
            f'    """{_said_shape(r, rows)}"""',
            f"    runs = {first}.is_cuda or {first}.is_meta or INTERPRETED or isinstance({first}, FakeTensor)",
            f"    if not runs or not ({fits}):",
            f"        return formula({names})",
            f"    return {out}",
        ]
    )


def _said_shape(r: Recipe, rows: Rows) -> str:
    what = f"[..., {r.width}]" if rows.single else "[B, " + ", ".join(str(n) for n in r.shape[1:]) + "]"
    return f"Rows {what}; the formula where no kernel runs or shapes are others."
