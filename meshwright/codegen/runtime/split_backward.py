"""Backward in two halves, for schedules that fill bubbles with it: gradients of the layers' linear weights wait until the schedule asks.

The first half is autograd's own, which frees what it has used; each linear module then keeps its input and the gradient of its output
(Qi et al. 2023, arXiv 2401.10241, section 2). Biases, norms, embeddings, experts and the head have their gradients in the first half.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.nn import functional as F

Waiting = deque[tuple[nn.Module, Tensor, Tensor, Tensor]]  # module, weight as it multiplies, input [rows, in], gradient of the output [rows, out]


class _Linear(torch.autograd.Function):
    """x W^T + b, whose backward leaves the gradient of W for later."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: nn.Module, waiting: Waiting) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.module, ctx.waiting = module, waiting
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            ctx.waiting.append((ctx.module, weight, x.flatten(0, -2), rows))
        dx = (rows @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, None, rows.sum(0) if ctx.needs_input_grad[2] else None, None, None


class WeightGradients:
    """What the weights of a part of the model wait for; called, as a PipelineStage's `dw_builder`, it hands over one microbatch's."""

    def __init__(self, part: nn.Module) -> None:
        self.part, self.waiting = part, Waiting()
        self._sharded: dict[int, Any] | None = None  # FSDP's own record of each parameter

    def __call__(self) -> Callable[[], None]:
        waiting = self.waiting.copy()
        self.waiting.clear()
        return functools.partial(self._run, waiting)

    def _run(self, waiting: Waiting) -> None:
        while waiting:
            self._compute(*waiting.popleft())

    def _compute(self, module: nn.Module, weight: Tensor, x: Tensor, grad: Tensor) -> None:
        if not weight.is_leaf:  # the local part of a sharded one
            torch.autograd.backward([weight], [grad.t() @ x])
        elif weight.grad is None:
            weight.grad = grad.t() @ x  # autograd would copy it
        else:
            weight.grad += grad.t() @ x
        self._add(module)

    def _add(self, module: nn.Module) -> None:
        """Adds a new gradient to FSDP's sum in fp32, as the end of an undivided backward would."""
        if self._sharded is None:
            states: list[Any] = [m._get_fsdp_state() for m in self.part.modules() if isinstance(m, FSDPModule)]  # type: ignore[attr-defined]
            groups = [g for s in states for g in (getattr(s, "_fsdp_param_groups", None) or [s._fsdp_param_group]) if g is not None]
            self._sharded = {id(p._unsharded_param): p for g in groups for p in g.fsdp_params}
        if (held := self._sharded.get(id(module._parameters["weight"]))) is not None:
            held.accumulate_unsharded_grad_if_needed()
            held.to_accumulated_grad_if_needed()


class SplitStage(PipelineStage):
    """A stage whose first half of a backward leaves gradients of weights to its `dw_builder`, a WeightGradients.

    What another chunk of the same rank takes or gives, where a V turns, is let go with the microbatch.
    """

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        if fwd_chunk_id == 0:  # torch made buffers for what is handed over inside the rank too
            for i in range(1, self.chunks or 1):
                self._let_go(i)
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        self.dw_builder.waiting.clear()  # type: ignore[union-attr]  # torch runs a backward of its own to learn shapes
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        self._let_go(bwd_chunk_id)

    def _let_go(self, i: int) -> None:
        for received, source in ((self.args_recv_info, self.stage_index - 1), (self.grad_recv_info, self.stage_index + 1)):
            if self.stage_index_to_group_rank.get(source) == self.group_rank:
                for info in received[i]:
                    info.buffer = None


def split_backward(part: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Lets the linear modules of layers put off their weights' gradients, before they are sharded. `part`, which holds the layers, is the
    module that the schedule runs. A head does not: the gradients of its logits would wait too."""
    gradients = WeightGradients(part)
    part.weight_gradients = gradients  # type: ignore[assignment]
    for module in (m for layer in layers for m in layer.modules()):
        transposed = type(module).__name__ == "Conv1D"  # of transformers: weight [in, out]
        if transposed or type(module).forward is nn.Linear.forward:
            module.forward = functools.partial(_forward, module, gradients.waiting, transposed)  # type: ignore[method-assign]


def _forward(module: nn.Module, waiting: Waiting, transposed: bool, x: Tensor) -> Tensor:
    weight: Any = module.weight
    return _Linear.apply(x, weight.t() if transposed else weight, module.bias, module, waiting)  # type: ignore[no-any-return]
