"""Context parallelism: ranks hold different tokens of the same samples, and attention joins them.

With "ring" rank r of n holds chunks r and 2n - 1 - r of the 2n that a sequence is cut into (zigzag), so that causal attention is the
same work for all; keys and values go round (Liu et al. 2023, arXiv:2310.01889). With "ulysses" it holds the r-th part, and attention
has all tokens of some of the heads, after an all-to-all (Jacobs et al. 2023, arXiv:2309.14509).
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .ring_block import block, block_backward

_attention = F.scaled_dot_product_attention
_in_ring: ContextVar[bool] = ContextVar("in_ring", default=False)
_results: ContextVar[tuple[list[tuple[Tensor, ...]], bool] | None] = ContextVar("results", default=None)


def slice_tokens(x: Tensor, dim: int, mesh: DeviceMesh, kind: str) -> Tensor:
    """This rank's tokens of a tensor that has all of them along `dim`; their number is divisible by the ranks (twice, in a ring)."""
    n, r = mesh.size(), mesh.get_local_rank()
    if kind == "ulysses":
        return x.chunk(n, dim)[r].contiguous()
    chunks = x.chunk(2 * n, dim)
    return torch.cat([chunks[r], chunks[2 * n - 1 - r]], dim)


def attend(layer: nn.Module, *, cp: DeviceMesh | None = None, kind: str = "ring", tp: DeviceMesh | None = None) -> None:
    """Makes scaled_dot_product_attention inside `layer` join the tokens of the ranks of `cp`.

    `tp`: its ranks have all key-value heads, and each takes those of its own query heads. Before recompute() of the layer.
    """
    layer.forward = functools.partial(_forward, layer.forward, cp, kind, tp)  # type: ignore[method-assign]


def _forward(forward: Callable[..., Any], cp: DeviceMesh | None, kind: str, tp: DeviceMesh | None, *args: Any, **kwargs: Any) -> Any:
    with _Attention(cp, kind, tp):
        return forward(*args, **kwargs)


class _Attention(TorchFunctionMode):
    """Computes calls of scaled_dot_product_attention, by whatever name a model has it."""

    def __init__(self, cp: DeviceMesh | None, kind: str, tp: DeviceMesh | None) -> None:
        super().__init__()
        self.cp, self.kind, self.tp = cp, kind, tp

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _attention:
            return self.attention(*args, **kwargs)
        if func is not F.multi_head_attention_forward:
            return func(*args, **kwargs)
        F.scaled_dot_product_attention = self.attention  # a mode does not see what the function calls in its turn
        try:
            return func(*args, **kwargs)
        finally:
            F.scaled_dot_product_attention = _attention

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if self.tp is not None:
            key, value = (select_heads(x, query.shape[1], self.tp) for x in (key, value))
        if self.cp is None:
            return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=key.shape[1] != query.shape[1])
        if attn_mask is not None or dropout_p or query.ndim != 4:
            raise ValueError("attention over context-parallel ranks takes [batch, heads, tokens, width], no mask and no dropout")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        join = ulysses_attention if self.kind == "ulysses" else ring_attention
        return join(query, key, value, is_causal, scale, self.cp.get_group())


def select_heads(x: Tensor, queries: int, mesh: DeviceMesh) -> Tensor:
    """The key-value heads of this rank's `queries` query heads, where x [B, K, S, D] has those of all ranks."""
    first, group = mesh.get_local_rank() * queries, queries * mesh.size() // x.shape[1]
    heads = [(first + i) // group for i in range(queries)]
    if queries % group and group % queries:  # some heads serve more of these queries than others
        return x[:, heads]
    return x[:, heads[0] : heads[-1] + 1]


# --- ulysses ---------------------------------------------------------------------------------------------------------


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: int, joined: int, group: Any) -> Tensor:
        ctx.cut, ctx.joined, ctx.group = cut, joined, group
        parts = torch.stack(x.chunk(dist.get_world_size(group), cut)).contiguous()
        return torch.cat(list(funcol.wait_tensor(funcol.all_to_all_single(parts, None, None, group))), joined)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _AllToAll.apply(grad, ctx.joined, ctx.cut, ctx.group), None, None, None


def ulysses_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, group: Any) -> Tensor:
    """Attention of this rank's queries [B, H, S / n, D] to all tokens; H is divisible by n. k, v [B, K, S / n, D], K divides H."""
    n = dist.get_world_size(group)
    times = n // math.gcd(k.shape[1], n)  # every rank needs a head of its own
    if times > 1:
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    q, k, v = (_AllToAll.apply(x, 1, 2, group) for x in (q, k, v))
    out = _attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return _AllToAll.apply(out, 2, 1, group)  # type: ignore[no-any-return]


# --- ring ------------------------------------------------------------------------------------------------------------


def ring_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, group: Any) -> Tensor:
    """Attention of this rank's queries [B, H, S / n, D] to the tokens of all ranks, in zigzag order. k, v [B, K, S / n, D], K divides H."""
    return _Ring.apply(q, k, v, causal, scale, group)  # type: ignore[no-any-return]


class _Shift:
    """Tensors on their way to the next rank; `wait` returns those of the rank before."""

    def __init__(self, tensors: list[Tensor], group: Any) -> None:
        n, r = dist.get_world_size(group), dist.get_rank(group)
        self.sent, self.received = tensors, [torch.empty_like(t) for t in tensors]
        sends = [dist.P2POp(dist.isend, t, group=group, group_peer=(r + 1) % n) for t in tensors]
        receives = [dist.P2POp(dist.irecv, t, group=group, group_peer=(r - 1) % n) for t in self.received]
        self.works = dist.batch_isend_irecv([*sends, *receives])

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        return self.received


def _parts(step: int, rank: int, tokens: int, causal: bool) -> tuple[slice, slice]:
    """Which of this rank's queries see which of the keys that it has at a step."""
    whole, half = slice(None), tokens // 2
    if not causal or step == 0:
        return whole, whole
    return (whole, slice(half)) if step <= rank else (slice(half, None), whole)  # from a rank before, or behind


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, group: Any) -> Tensor:
        kept = _results.get()
        if kept is not None and kept[1]:
            results = kept[0].pop(0)
        else:
            token = _in_ring.set(True)
            try:
                results = _ring_forward(q, k.contiguous(), v.contiguous(), causal, scale, group)
            finally:
                _in_ring.reset(token)
            if kept is not None:
                kept[0].append(results)
        ctx.save_for_backward(q, k, v, *results)  # not copies of k and v: what they are views of may be kept for q
        ctx.causal, ctx.scale, ctx.group = causal, scale, group
        return results[0].detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        q, k, v, *results = ctx.saved_tensors
        grad, k, v = grad if grad.stride(-1) == 1 else grad.contiguous(), k.contiguous(), v.contiguous()
        grads = _ring_backward(grad, q, k, v, results, ctx.causal, ctx.scale, ctx.group)
        return (*grads, None, None, None)


def _ring_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, group: Any) -> tuple[Tensor, ...]:
    """The result, its log-sum-exp [B, H, S / n], and what the kernel's backward wants besides."""
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    made, lse, *state = block(q, k, v, causal, scale)
    shift = _Shift([k, v], group) if n > 1 else None
    out, lse = made.to(torch.float32, copy=True), lse.clone()
    for step in range(1, n):
        assert shift is not None
        keys, values = shift.wait()
        shift = _Shift([keys, values], group) if step < n - 1 else None
        mine, seen = _parts(step, rank, q.shape[2], causal)
        made, more, *_ = block(q[:, :, mine], keys[:, :, seen], values[:, :, seen], False, scale)
        into, known = out[:, :, mine], lse[:, :, mine]
        total = torch.logaddexp(known, more)
        into.mul_((known - total).exp().unsqueeze(-1)).add_(made * (more - total).exp().unsqueeze(-1))
        known.copy_(total)
    return out.to(q.dtype), lse, *state


def _ring_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, results: list[Tensor], causal: bool, scale: float, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. Those of keys and values travel with them, one step behind, and end at home."""
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    out, lse, *state = results
    shift = _Shift([k, v], group) if n > 1 else None
    dq, *dkv = (x.float().contiguous() for x in block_backward(grad, q, k, v, out, lse, state, causal, scale))
    home = _Shift(dkv, group) if n > 1 else None
    for step in range(1, n):
        assert shift is not None
        assert home is not None
        keys, values = shift.wait()
        shift = _Shift([keys, values], group) if step < n - 1 else shift
        mine, seen = _parts(step, rank, q.shape[2], causal)
        keys, values = keys[:, :, seen], values[:, :, seen]
        made = block_backward(grad[:, :, mine], q[:, :, mine], keys, values, out[:, :, mine], lse[:, :, mine], state, False, scale)
        dq[:, :, mine] += made[0]
        dkv = home.wait()
        for total, part in zip(dkv, made[1:], strict=True):
            total[:, :, seen] += part
        home = _Shift(dkv, group)
    dk, dv = home.wait() if home is not None else dkv
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


# --- recompute -------------------------------------------------------------------------------------------------------


def in_ring() -> bool:
    """Whether attention over a ring is being computed: what one block of it returns is not worth keeping."""
    return _in_ring.get()


def keeping(contexts: tuple[Any, Any]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """A checkpoint's contexts, in which a layer's recompute takes the results of attention over a ring from its forward."""
    results: list[tuple[Tensor, ...]] = []
    return _kept(contexts[0], results, False), _kept(contexts[1], results, True)


@contextmanager
def _kept(context: Any, results: list[tuple[Tensor, ...]], again: bool) -> Iterator[None]:
    token = _results.set((results, again))
    try:
        with context:
            yield
    finally:
        _results.reset(token)
