"""Recipes that the tests of kernels share: those of the models, at small shapes."""

from __future__ import annotations

from typing import Any

from meshwright.codegen.kernels.recipe import Input, Output, Recipe, Save, Step

ROWS = (1, 6)  # of one sample


def steps(*rows: tuple[Any, ...]) -> tuple[Step, ...]:
    return tuple(Step(name=name, op=op, args=tuple(args)) for name, op, *args in rows)


def rows(name: str, width: int, dtype: str, **more: Any) -> Input:
    return Input(name=name, over="rows", dtype=dtype, shape=(*ROWS, width), strides=(ROWS[1] * width, width, 1), **more)


def weight(name: str, width: int, dtype: str) -> Input:
    return Input(name=name, over="columns", dtype=dtype, shape=(width,), strides=(1,))


def leaves(value: str, width: int, dtype: str) -> Output:
    return Output(value=value, dtype=dtype, strides=(ROWS[1] * width, width, 1))


def add_rms_norm(dtype: str, save: Save = "inputs", width: int = 48) -> Recipe:
    """Residual addition and RMSNorm, as transformers writes it."""
    said = steps(
        ("h", "add", "a", "b"), ("c", "cast", "h"), ("p", "pow", "c", 2.0), ("m", "mean", "p"), ("e", "add", "m", 1e-5), ("s", "rsqrt", "e"),
        ("k", "mul", "c", "s"), ("y", "mul", "weight", "k"),
    )  # fmt: skip
    inputs = (rows("a", width, dtype), rows("b", width, dtype), weight("weight", width, dtype))
    outputs = (leaves("h", width, dtype), leaves("y", width, dtype))
    return Recipe(label="add_rms_norm", shape=(*ROWS, width), inputs=inputs, steps=said, outputs=outputs, save=save)


def layer_norm(dtype: str, save: Save = "inputs", width: int = 64) -> Recipe:
    said = steps(
        ("m", "mean", "x"), ("c", "sub", "x", "m"), ("q", "mul", "c", "c"), ("v", "mean", "q"), ("e", "add", "v", 1e-5), ("s", "rsqrt", "e"),
        ("n", "mul", "c", "s"), ("w", "mul", "n", "weight"), ("y", "add", "w", "bias"),
    )  # fmt: skip
    inputs = (rows("x", width, dtype), weight("weight", width, dtype), weight("bias", width, dtype))
    return Recipe(label="layer_norm", shape=(*ROWS, width), inputs=inputs, steps=said, outputs=(leaves("y", width, dtype),), save=save)


def gated(dtype: str, save: Save = "inputs", act: str = "silu", width: int = 40) -> Recipe:
    """SwiGLU, or GeGLU with another activation."""
    inputs = (rows("a", width, dtype), rows("b", width, dtype))
    said = steps(("s", act, "a"), ("y", "mul", "s", "b"))
    return Recipe(label="gated", shape=(*ROWS, width), inputs=inputs, steps=said, outputs=(leaves("y", width, dtype),), save=save)


def norm_rope(dtype: str, save: Save = "inputs", heads: int = 3, seq: int = 6, width: int = 24) -> Recipe:
    """RMSNorm of each head and rotary embedding, on a projection seen as [batch, heads, seq, width]."""
    strides = (seq * heads * width, width, heads * width, 1)
    x = Input(name="x", over="rows", dtype=dtype, shape=(1, heads, seq, width), strides=strides)
    tables = [
        Input(name=n, over="rows", dtype=dtype, shape=(1, seq, width), strides=(seq * width, width, 1), gradient=False, batched=False)
        for n in ("cos", "sin")
    ]  # fmt: skip
    said = steps(
        ("p", "pow", "x", 2.0), ("m", "mean", "p"), ("e", "add", "m", 1e-6), ("s", "rsqrt", "e"), ("k", "mul", "x", "s"), ("z", "mul", "weight", "k"),
        ("a", "mul", "z", "cos"), ("hi", "high", "z"), ("n", "neg", "hi"), ("lo", "low", "z"), ("t", "cat", "n", "lo"), ("b", "mul", "t", "sin"),
        ("y", "add", "a", "b"),
    )  # fmt: skip
    outputs = (Output(value="y", dtype=dtype, strides=strides),)
    inputs = (x, *tables, weight("weight", width, dtype))
    return Recipe(label="norm_rope", shape=(1, heads, seq, width), inputs=inputs, steps=said, outputs=outputs, save=save)
