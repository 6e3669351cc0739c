"""Kernels in a live model: a module's forward is replaced by one that calls them, written as text from the region or from its own source.

Kernels go in before tensor parallelism, recompute and FSDP: those wrap the forward that they find, convert what enters and leaves it
and swap its parameters for local ones. Submodules that the new forward calls are called as before, hooks and all. A module whose
code is not of a known form is left as it is, and said.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import textwrap
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from meshwright.codegen.kernels.building import Use
from meshwright.codegen.kernels.choose import Kernel
from meshwright.codegen.kernels.load import load
from meshwright.codegen.kernels.recipe import Recipe
from meshwright.codegen.kernels.regions import Region


@dataclass
class Installed:
    """`done`: modules that now run kernels, and the text of their forward. `left`: modules that do not, and why."""

    done: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


class _Left(Exception):
    """Why a module keeps its forward."""


def install(model: nn.Module, kernels: Iterable[Kernel]) -> Installed:
    """Puts generated kernels into the modules of `model` that they name; modules that are not there (another stage's) are passed over."""
    found, held = Installed(), dict(model.named_modules())
    for kernel in kernels:
        for path in kernel.modules if kernel.region is not None else ():
            assert kernel.region is not None
            if path not in held or isinstance(held[path], nn.Identity):
                continue
            try:
                found.done[path] = _PLACES[kernel.region.place](model, path, kernel.region)
            except _Left as e:
                found.left[path] = str(e)
    return found


def _function(recipe: Recipe) -> Callable[..., Any]:
    return getattr(load(recipe), recipe.label)  # type: ignore[no-any-return]


def _source(module: nn.Module) -> Callable[..., Any]:
    """The forward of a module's class, which must be a plain function that nothing has replaced."""
    forward = type(module).forward
    if getattr(module, "gradient_checkpointing", None) is False and getattr(forward, "__name__", "") == "forward":
        forward = inspect.unwrap(forward)  # transformers wraps layers to recompute them, which a plan does itself
    if "forward" in module.__dict__:
        raise _Left("its forward was replaced before")
    if not isinstance(forward, types.FunctionType) or hasattr(forward, "__wrapped__") or forward.__code__.co_freevars:
        raise _Left("its forward is not a plain function")
    return forward


def _parameters(forward: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(forward).parameters)


def _compiled(text: str, name: str, where: str, given: dict[str, Any]) -> Any:
    """A function from its text; tracebacks show the lines."""
    file = f"<kernels of {where}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    local: dict[str, Any] = {}
    exec(compile(text, file, "exec"), given, local)
    return local[name]


# --- a module's own arithmetic ---------------------------------------------------------------------------------------


def module_text(region: Region, takes: str) -> tuple[str, dict[str, Recipe]]:
    """The text of a module's forward, and the recipes of the functions that it calls by name. `takes` is its parameter's name."""
    names = {region.takes[0]: takes}
    functions: dict[str, Recipe] = {}
    lines = [f"def forward(self, {takes}):"]
    left: list[tuple[str, str, list[str], str]] = [("", child, [value], out) for child, value, out in region.calls]
    for use in region.uses:
        name = use.recipe.label if functions.get(use.recipe.label, use.recipe) == use.recipe else f"{use.recipe.label}_{len(functions)}"
        functions[name] = use.recipe
        left.append((name, "", list(use.arguments), use.gives[0]))
    while left:
        ready = next(x for x in left if all(a in names or a.startswith("param:") for a in x[2]))
        left.remove(ready)
        function, child, arguments, out = ready
        said = ", ".join(f"self.{a[6:].removeprefix(f'{region.module}.')}" if a.startswith("param:") else names[a] for a in arguments)
        callee = function or "self" + "".join(f"[{p}]" if p.isdigit() else f".{p}" for p in child.split("."))
        last = out == region.returns and not left
        lines.append(f"    return {callee}({said})" if last else f"    {out} = {callee}({said})")
        names[out] = out
    if not lines[-1].startswith("    return"):
        lines.append(f"    return {names[region.returns]}")
    return "\n".join(lines) + "\n", functions


def _module(model: nn.Module, path: str, region: Region) -> str:
    module = model.get_submodule(path)
    takes = _parameters(_source(module))[1:]
    if len(takes) != 1:
        raise _Left(f"its forward takes {', '.join(takes)}")
    for child, _, _ in region.calls:
        if len(_parameters(module.get_submodule(child).forward)) != 1:
            raise _Left(f"{child} may be given more than a tensor")
    if any(len(u.gives) != 1 for u in region.uses):
        raise _Left("a kernel gives several values")
    text, recipes = module_text(region, takes[0])
    made = _compiled(text, "forward", path, {name: _function(r) for name, r in recipes.items()})
    module.forward = types.MethodType(made, module)  # type: ignore[method-assign]
    return text


# --- a residual addition and the norm after it -----------------------------------------------------------------------


def _add_norm(model: nn.Module, path: str, region: Region) -> str:
    """The norm takes two tensors: it returns the norm of their sum, and leaves the sum for the module that called it."""
    above, _, child = path.rpartition(".")
    parent, norm = model.get_submodule(above), model.get_submodule(path)
    original = norm.forward
    if len(_parameters(_source(norm))) != 2:
        raise _Left("the norm takes more than a tensor")
    text = fused_text(_source(parent), child)
    (use,) = region.uses
    function, names = _function(use.recipe), [a.rpartition(".")[2] for a in use.arguments if a.startswith("param:")]

    def forward(a: Tensor, b: Tensor | None = None) -> Tensor:
        if b is None:
            return original(a)  # type: ignore[no-any-return]
        norm.__dict__["added"], normed = function(a, b, *(getattr(norm, n) for n in names))
        return normed

    made = _compiled(text, "forward", above, _source(parent).__globals__)
    norm.forward = forward  # type: ignore[method-assign]
    made.__defaults__, made.__kwdefaults__ = _source(parent).__defaults__, _source(parent).__kwdefaults__  # type: ignore[attr-defined]
    parent.forward = types.MethodType(made, parent)  # type: ignore[method-assign]
    return text


def fused_text(forward: Callable[..., Any], norm: str) -> str:
    """A forward in which `s = a + b; ...; y = self.<norm>(s)` is one call of the norm, which keeps the sum. _Left where it is not there."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, SyntaxError):
        raise _Left("its source cannot be read") from None
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    if function.decorator_list:
        raise _Left("its forward is decorated")
    body = function.body
    callee = ast.dump(ast.parse(f"self.{norm}", mode="eval").body)
    for j, end in enumerate(body):
        if not (isinstance(end, ast.Assign) and isinstance(end.value, ast.Call) and ast.dump(end.value.func) == callee):
            continue
        if len(end.value.args) != 1 or end.value.keywords or not isinstance(end.value.args[0], ast.Name):
            continue
        i, name = _addition(body, j, end.value.args[0].id)
        start = body[i]
        assert isinstance(start, ast.Assign)
        assert isinstance(start.value, ast.BinOp)
        call = ast.Call(end.value.func, [start.value.left, start.value.right], [])
        body[j] = ast.Assign(end.targets, ast.Name("normed", ast.Load()))
        body[i : i + 1] = [
            ast.Assign([ast.Name("normed", ast.Store())], call),
            ast.parse(f'{name} = self.{norm}.__dict__.pop("added")').body[0],
        ]
        function.args.defaults, function.args.kw_defaults = [ast.Constant(None) for _ in function.args.defaults], [
            None if d is None else ast.Constant(None) for d in function.args.kw_defaults
        ]  # fmt: skip
        for a in ast.walk(function):
            if isinstance(a, ast.arg):
                a.annotation = None
        function.returns = None
        return ast.unparse(ast.fix_missing_locations(tree)) + "\n"
    raise _Left(f"its forward does not call self.{norm} on a sum in a line of its own")


def _addition(body: list[ast.stmt], j: int, name: str) -> tuple[int, str]:
    """The statement before j that adds what is in `name` there, and its target; only renamings may stand between."""
    for i in range(j - 1, -1, -1):
        s = body[i]
        if not (isinstance(s, ast.Assign) and len(s.targets) == 1 and isinstance(s.targets[0], ast.Name)):
            break
        target = s.targets[0].id
        if isinstance(s.value, ast.BinOp) and isinstance(s.value.op, ast.Add) and target == name:
            return i, name
        if not isinstance(s.value, ast.Name):
            break
        if target == name:
            name = s.value.id
    raise _Left("the norm does not follow an addition")


# --- rotary embeddings -----------------------------------------------------------------------------------------------


def _rotary(model: nn.Module, path: str, region: Region) -> str:
    """The function that embeds queries and keys, by the name that the attention's forward knows it by."""
    attention = model.get_submodule(path)
    forward = _source(attention)
    known = [n for n in forward.__code__.co_names if "rotary" in n and callable(forward.__globals__.get(n))]
    if len(known) != 1 or _parameters(forward.__globals__[known[0]])[:4] != ["q", "k", "cos", "sin"]:
        raise _Left("its forward calls no function of (q, k, cos, sin) to embed positions")
    original = forward.__globals__[known[0]]
    sides = [_Side(model, path, region, use) for use in region.uses]

    @functools.wraps(original)
    def embed(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        held = [side.held() for side in sides]
        if rest or options or not all(side.fits(x, cos) for side, x in zip(sides, (q, k))):
            q, k = (side.normed(x, h) for side, x, h in zip(sides, (q, k), held))
            return original(q, k, cos, sin, *rest, **options)  # type: ignore[no-any-return]
        first, second = (side(x, cos, sin, h) for side, x, h in zip(sides, (q, k), held))
        return first, second

    for side in sides:
        side.defer()
    made = types.FunctionType(forward.__code__, {**forward.__globals__, known[0]: embed}, forward.__name__, forward.__defaults__)
    made.__kwdefaults__ = forward.__kwdefaults__
    attention.forward = types.MethodType(made, attention)  # type: ignore[method-assign]
    norms = f", after {' and '.join(s.norm_path for s in sides)}, which hand on what they are given" if sides[0].norm is not None else ""
    return f"{known[0]} is {' and '.join(dict.fromkeys(u.recipe.name for u in region.uses))}{norms}\n"


class _Side:
    """Queries or keys: the kernel, and the norm that it computes too, whose module hands its input on and lends its parameters."""

    def __init__(self, model: nn.Module, path: str, region: Region, use: Use) -> None:
        self.use, self.function = use, _function(use.recipe)
        params = [a[6:] for a in use.arguments if a.startswith("param:")]
        self.names = [p.rpartition(".")[2] for p in params]
        self.norm_path = params[0].rpartition(".")[0].removeprefix(f"{region.module}.") if params else ""
        self.norm = model.get_submodule(f"{path}.{self.norm_path}") if params else None
        if self.norm is not None and len(_parameters(_source(self.norm))) != 2:
            raise _Left(f"{self.norm_path} takes more than a tensor")
        self.original: Callable[..., Any] = type(self.norm).forward if self.norm is not None else _source

    def defer(self) -> None:
        if self.norm is None:
            return
        norm, names = self.norm, self.names

        def forward(x: Tensor) -> Tensor:
            norm.__dict__["held"] = {n: getattr(norm, n) for n in names}
            return x

        norm.forward = forward  # type: ignore[method-assign]

    def held(self) -> dict[str, Tensor]:
        return {} if self.norm is None else self.norm.__dict__.pop("held")

    def fits(self, x: Tensor, cos: Tensor) -> bool:
        r = self.use.recipe
        table = next(i.shape for i in r.inputs if i.name == "cos")
        return x.shape[1:] == r.shape[1:] and cos.shape == table

    def normed(self, x: Tensor, held: dict[str, Tensor]) -> Tensor:
        """The norm on its own, for shapes that the kernel is not for."""
        if self.norm is None:
            return x
        return self.original(types.SimpleNamespace(**{**self.norm.__dict__, **held}), x)  # type: ignore[no-any-return]

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, held: dict[str, Tensor]) -> Tensor:
        known = {"cos": cos, "sin": sin, **held}
        return self.function(*(known.get(i.name, x) for i in self.use.recipe.inputs))  # type: ignore[no-any-return]


_PLACES: dict[str, Callable[[nn.Module, str, Region], str]] = {"module": _module, "add_norm": _add_norm, "rotary": _rotary}
