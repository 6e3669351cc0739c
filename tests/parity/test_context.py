"""Attention over ranks that hold different tokens gives what one process gives, in a ring and by all-to-all, inside any model's code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.integrations.sdpa_attention import sdpa_attention_forward

sys.path.insert(0, str(Path(__file__).parent))
from harness import run

from meshwright.codegen.runtime import ring_block
from meshwright.codegen.runtime.context import attend, in_ring, keeping, ring_attention, select_heads, slice_tokens, ulysses_attention
from meshwright.codegen.runtime.ring_block import _math, _math_backward, block, block_backward

ATTENTION_TOLERANCE, LOSS_TOLERANCE, GRADIENT_TOLERANCE = 2e-6, 1e-6, 5e-6
KINDS = ("ring", "ulysses")
BATCH, TOKENS, WIDTH = 2, 16, 8
SHAPES = [(4, 4, WIDTH), (8, 4, WIDTH), (8, 2, WIDTH), (4, 1, WIDTH), (4, 4, 4)]  # query heads, key-value heads, width of the values


def _mesh(world: int) -> DeviceMesh:
    return init_device_mesh("cpu", (world,), mesh_dim_names=("cp",))


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


# --- attention alone ---------------------------------------------------------------------------------------------------


def _attention_errors(world: int) -> list[tuple[str, float]]:
    mesh, errors = _mesh(world), []
    for kind, causal, (heads, kv_heads, width) in ((k, c, s) for k in KINDS for c in (True, False) for s in SHAPES):
        torch.manual_seed(0)
        shapes = ((heads, WIDTH), (kv_heads, WIDTH), (kv_heads, width))
        whole = [torch.randn(BATCH, h, TOKENS, d, requires_grad=True) for h, d in shapes]
        out = F.scaled_dot_product_attention(*whole, is_causal=causal, scale=0.3, enable_gqa=True)
        sent = torch.randn_like(out)
        wanted = [out, *torch.autograd.grad(out, whole, sent)]
        own = [slice_tokens(x.detach(), 2, mesh, kind).requires_grad_() for x in whole]
        join = ring_attention if kind == "ring" else ulysses_attention
        made = join(*own, causal, 0.3, mesh.get_group())
        found = [made, *torch.autograd.grad(made, own, slice_tokens(sent, 2, mesh, kind))]
        for name, x, y in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
            errors.append((f"{kind} causal={causal} {heads}/{kv_heads}x{width} {name}", _error(x, slice_tokens(y, 2, mesh, kind))))
    return errors


@pytest.mark.parametrize("world", [2, 4])
def test_attention_over_ranks_is_attention(world: int) -> None:
    for errors in run(world, _attention_errors, world):
        assert [(name, e) for name, e in errors if not e < ATTENTION_TOLERANCE] == []


def test_a_ring_computes_as_much_on_every_rank_where_attention_is_causal() -> None:
    """Zigzag: a rank without it would have up to twice the mean."""
    from meshwright.codegen.runtime.context import _parts

    def pairs(rank: int, world: int) -> int:
        rows = range(TOKENS)
        return sum(len(rows[q]) * len(rows[k]) for q, k in (_parts(s, rank, TOKENS, True) for s in range(1, world)))

    assert {pairs(r, 4) for r in range(4)} == {3 * TOKENS * TOKENS // 2}


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_in_plain_arithmetic_are_the_kernels(causal: bool) -> None:
    """What devices without a fused kernel compute: results, log-sum-exp and gradients."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(BATCH, h, TOKENS, WIDTH) for h in (8, 2, 2))
    out, lse = block(q, k, v, causal, 0.3)
    plain = _math(q, k, v, causal, 0.3)
    assert max(_error(plain[0], out), _error(plain[1], lse)) < ATTENTION_TOLERANCE
    grad = torch.randn_like(out)
    pairs = zip(_math_backward(grad, q, k, v, out, lse, causal, 0.3), block_backward(grad, q, k, v, out, lse, (), causal, 0.3), strict=True)
    assert max(_error(a, b) for a, b in pairs) < ATTENTION_TOLERANCE


# --- key-value heads on every tensor-parallel rank -----------------------------------------------------------------------


class _Plain(nn.Module):
    """Attention as plain code writes it: with `repeat` key-value heads are repeated before the call."""

    def __init__(self, repeat: bool, call: Callable[..., Tensor] = F.scaled_dot_product_attention) -> None:
        super().__init__()
        self.repeat, self.call = repeat, call

    def forward(self, q: Tensor, k: Tensor, v: Tensor, times: int) -> Tensor:
        if self.repeat:
            k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        return self.call(q, k, v, is_causal=True, enable_gqa=not self.repeat and times > 1)


def _selection_errors(tp: int, cp: int) -> list[tuple[str, float]]:
    mesh, errors = init_device_mesh("cpu", (cp, tp), mesh_dim_names=("cp", "tp")), []
    for kind, heads, kv_heads, repeat in ((k, h, kv, r) for k in KINDS for h, kv in ((8, 1), (8, 2), (4, 2), (8, 4)) for r in (False, True)):
        torch.manual_seed(0)
        whole = [torch.randn(BATCH, h, TOKENS, WIDTH, requires_grad=True) for h in (heads, kv_heads, kv_heads)]
        out = F.scaled_dot_product_attention(*whole, is_causal=True, enable_gqa=True)
        sent = torch.randn_like(out)
        wanted = [out, *torch.autograd.grad(out, whole, sent)]

        def local(x: Tensor, kind: str = kind) -> Tensor:
            return slice_tokens(x.chunk(tp, 1)[mesh["tp"].get_local_rank()], 2, mesh["cp"], kind) if cp > 1 else x.chunk(tp, 1)[dist.get_rank()]

        def keys(x: Tensor, kind: str = kind) -> Tensor:
            return slice_tokens(x, 2, mesh["cp"], kind) if cp > 1 else x

        own = [local(whole[0].detach()), *(keys(x.detach()) for x in whole[1:])]
        own = [x.requires_grad_() for x in own]
        layer = _Plain(repeat)
        attend(layer, cp=mesh["cp"] if cp > 1 else None, kind=kind, tp=mesh["tp"])
        made = layer(*own, heads // kv_heads)
        found = [made, *torch.autograd.grad(made, own, local(sent))]
        for x in found[2:]:  # a partial sum on every rank
            dist.all_reduce(x, group=mesh["tp"].get_group())
        expected = [local(wanted[0]), local(wanted[1]), keys(wanted[2]), keys(wanted[3])]
        for name, x, y in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
            errors.append((f"{kind} {heads}/{kv_heads} repeat={repeat} {name}", _error(x, y)))
    return errors


@pytest.mark.parametrize(("tp", "cp"), [(2, 1), (4, 1), (2, 2)])
def test_a_rank_takes_the_key_value_heads_of_its_queries(tp: int, cp: int) -> None:
    for errors in run(tp * cp, _selection_errors, tp, cp):
        assert [(name, e) for name, e in errors if not e < ATTENTION_TOLERANCE] == []


class _Rank:
    """A mesh as far as select_heads reads it."""

    def __init__(self, rank: int, size: int) -> None:
        self.get_local_rank, self.size = lambda: rank, lambda: size


@pytest.mark.parametrize(("queries", "kv_heads", "ranks"), [(4, 2, 2), (2, 1, 4), (2, 8, 4), (3, 2, 2), (3, 4, 4), (6, 4, 2)])
def test_every_query_head_meets_its_key_value_head(queries: int, kv_heads: int, ranks: int) -> None:
    x = torch.arange(kv_heads).reshape(1, kv_heads, 1, 1)
    for rank in range(ranks):
        chosen = select_heads(x, queries, _Rank(rank, ranks)).flatten()  # type: ignore[arg-type]
        met = chosen.repeat_interleave(queries // len(chosen))
        assert met.tolist() == [(rank * queries + i) * kv_heads // (queries * ranks) for i in range(queries)]


# --- models ------------------------------------------------------------------------------------------------------------

_WIDTHS: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 64,
    "max_position_embeddings": 32, "use_cache": False,
}  # fmt: skip


class _Encoder(nn.Module):
    """torch's own encoder layers, whose attention is a function of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(64, 32), nn.Embedding(TOKENS, 32)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True) for _ in range(2))
        self.head = nn.Linear(32, 64)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.positions(position_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


def _models() -> dict[str, tuple[Callable[[], nn.Module], str]]:
    latent = {
        **_WIDTHS, "num_key_value_heads": 8, "first_k_dense_replace": 2, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 8, "n_group": 4, "topk_group": 2,
    }  # fmt: skip
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32, "use_cache": False}
    t = transformers
    return {
        "llama": (lambda: t.LlamaForCausalLM(t.LlamaConfig(**_WIDTHS)), "model.layers"),
        "qwen3": (lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**_WIDTHS, head_dim=8)), "model.layers"),
        "deepseek": (lambda: t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**latent)), "model.layers"),
        "gpt2": (lambda: t.GPT2LMHeadModel(t.GPT2Config(**gpt2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)), "transformer.h"),
        "encoder": (_Encoder, "layers"),
    }


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default}
    return CheckpointPolicy.MUST_SAVE if op in kept and not in_ring() else CheckpointPolicy.PREFER_RECOMPUTE


def _selective() -> tuple[Any, Any]:
    return keeping(create_selective_checkpoint_contexts(_policy))


def _recompute(layer: nn.Module, mode: str) -> None:
    if mode != "none":
        extra = {"context_fn": _selective} if mode == "selective" else {}
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, **extra)  # type: ignore[method-assign]


def _loss(model: nn.Module, ids: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
    out = model(input_ids=ids, position_ids=positions)
    logits = out if isinstance(out, Tensor) else out.logits
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten())


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randint(0, 64, (BATCH, TOKENS)), torch.randint(0, 64, (BATCH, TOKENS)), torch.arange(TOKENS).unsqueeze(0)


def _build(name: str) -> tuple[nn.Module, Iterable[nn.Module]]:
    torch.manual_seed(0)
    make, layers = _models()[name]
    model = make().train()
    if isinstance(model, transformers.PreTrainedModel):  # an attention without a mask function: nothing is read from the positions
        transformers.AttentionInterface.register("maskless", sdpa_attention_forward)
        model.set_attn_implementation("maskless")
    return model, model.get_submodule(layers).children()


def _model_errors(world: int, names: list[str], modes: list[str]) -> list[tuple[str, float, float]]:
    mesh, found = _mesh(world), []
    for name in names:
        model, _ = _build(name)
        wanted = _loss(model, *_batch())
        wanted.backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        floor = 1e-3 * max(float(g.abs().max()) for g in gradients.values() if g is not None)
        for kind, mode in ((k, m) for k in KINDS for m in modes):
            model, layers = _build(name)
            for layer in layers:
                attend(layer, cp=mesh["cp"], kind=kind)
                _recompute(layer, mode)
            loss = _loss(model, *(slice_tokens(x, 1, mesh, kind) for x in _batch()))
            loss.backward()
            total = loss.detach() / world
            dist.all_reduce(total)
            worst = 0.0
            for n, p in model.named_parameters():
                g = gradients[n]
                assert (p.grad is None) == (g is None), n
                if p.grad is not None and g is not None:
                    dist.all_reduce(p.grad)
                    worst = max(worst, float((p.grad / world - g).abs().max()) / max(float(g.abs().max()), floor))
            found.append((f"{name} {kind} {mode}", float((total - wanted).abs() / wanted), worst))
    return found


@pytest.mark.parametrize(
    ("world", "names", "modes"),
    [(2, [*_models()], ["none"]), (4, ["llama", "qwen3", "gpt2"], ["none"]), (2, ["llama"], ["full", "selective"])],
)
def test_models_train_as_on_one_process(world: int, names: list[str], modes: list[str]) -> None:
    for found in run(world, _model_errors, world, names, modes):
        assert [x for x in found if not (x[1] < LOSS_TOLERANCE and x[2] < GRADIENT_TOLERANCE)] == []


def _sends_of_recompute(mode: str) -> int:
    """Exchanges around the ring in a step."""
    calls = 0
    real = dist.batch_isend_irecv

    def counted(ops: list[Any]) -> Any:
        nonlocal calls
        calls += 1
        return real(ops)

    model, layers = _build("llama")
    mesh = _mesh(2)
    for layer in layers:
        attend(layer, cp=mesh["cp"])
        _recompute(layer, mode)
    dist.batch_isend_irecv = counted
    try:
        _loss(model, *(slice_tokens(x, 1, mesh, "ring") for x in _batch())).backward()
    finally:
        dist.batch_isend_irecv = real
    return calls


def test_selective_recompute_sends_nothing_again() -> None:
    """A layer of two ranks: forward sends keys and values once, backward once, and their gradients twice; full recompute forward again."""
    for calls in run(2, lambda: {m: _sends_of_recompute(m) for m in ("none", "selective", "full")}):
        assert calls == {"none": 8, "selective": 8, "full": 10}


# --- what cannot be computed, and shapes alone ---------------------------------------------------------------------------


def _refusals() -> list[str]:
    q = torch.randn(1, 2, 4, WIDTH)
    mesh, found = _mesh(2), []
    for extra in ({"attn_mask": torch.zeros(4, 4)}, {"dropout_p": 0.5}):
        layer = _Plain(True, lambda *a, extra=extra, **kw: F.scaled_dot_product_attention(*a, **(kw | extra)))
        attend(layer, cp=mesh["cp"])
        try:
            layer(q, q, q, 1)
        except ValueError as e:
            found.append(str(e))
    return found


def test_masks_and_dropout_are_refused() -> None:
    for found in run(2, _refusals):
        assert ["no mask" in e for e in found] == [True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_run_without_peers(kind: str) -> None:
    """As rank 5 of 8 on fake tensors: gradients have the shapes and dtypes of what they belong to."""
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    try:
        mesh = init_device_mesh("cpu", (8,), mesh_dim_names=("cp",))
        with FakeTensorMode():
            shapes = ((8, WIDTH), (8, WIDTH), (8, 4))
            own = [torch.empty(BATCH, h, 8, d, dtype=torch.bfloat16, requires_grad=True) for h, d in shapes]
            layer = _Plain(False)
            attend(layer, cp=mesh["cp"], kind=kind)
            out = layer(*own, 1)
            assert out.shape == (BATCH, 8, 8, 4)
            grads = torch.autograd.grad(out.float().sum(), own)
            assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype) for x in own]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("width", [WIDTH, 12])
def test_the_kernel_of_a_gpu_takes_what_it_is_given(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments and shapes alone: other widths of values, fewer key-value heads, and half of the queries or keys."""
    monkeypatch.setattr(ring_block, "_kernel", lambda q: "flash")
    q = torch.empty(BATCH, 8, TOKENS, width, dtype=torch.bfloat16, device="meta")
    k, v = (torch.empty(BATCH, 2, TOKENS // 2, d, dtype=torch.bfloat16, device="meta") for d in (width, WIDTH))
    out, lse, *state = block(q, k, v, False, 0.3)
    assert (out.shape, lse.shape, lse.dtype) == ((BATCH, 8, TOKENS, WIDTH), (BATCH, 8, TOKENS), torch.float32)
    grads = block_backward(torch.empty_like(out), q, k, v, out, lse, state, False, 0.3)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
