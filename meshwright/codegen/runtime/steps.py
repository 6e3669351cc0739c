"""One training step over all microbatches: one after another, or through a pipeline schedule."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti

from .mesh import Mesh
from .pipeline import PerMicrobatch, reshard
from .split_backward import SplitStage

Loss = Callable[[Tensor, Tensor], Tensor]


def accumulate(stage: nn.Module, inputs: Sequence[Tensor], labels: Tensor, loss: Loss, microbatches: int, zero: int) -> Tensor:
    """Forward and backward of each microbatch in turn; the sum of their losses. Gradients of ZeRO 0 and 1 are reduced once a step."""
    total = torch.zeros((), device=labels.device)
    for i, (*columns, wanted) in enumerate(zip(*(x.chunk(microbatches) for x in (*inputs, labels)), strict=True)):
        if isinstance(stage, FSDPModule):
            last = i == microbatches - 1
            stage.set_requires_gradient_sync(last or zero >= 2)
            stage.set_reshard_after_backward(last or zero == 3)  # below ZeRO 3 parameters stay gathered through the step
            stage.set_is_last_backward(last)
        found = loss(stage(*columns), wanted)
        found.backward()
        total += found.detach()
    return total


def pipeline(
    kind: type[Any], parts: Sequence[nn.Module], places: Sequence[int], mesh: Mesh, microbatches: int, loss: Loss, zero: int,
    examples: Sequence[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = (),
) -> Any:  # fmt: skip
    """The schedule of a rank's chunks. `places`: where each stands in the model's order.

    With examples of what each chunk takes and returns, ranks need not tell each other.
    """
    pp = mesh["pp"]
    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device(mesh.device_type)
    stages = []
    for i, (part, place) in enumerate(zip(parts, places, strict=True)):
        module = PerMicrobatch(part) if isinstance(part, FSDPModule) and zero >= 2 else part
        takes, returns = examples[i] if examples else (None, None)
        later = getattr(part, "weight_gradients", None)
        stage = PipelineStage if later is None else SplitStage
        stages.append(stage(module, place, pp.size() * len(parts), device, takes, returns, group=pp.get_group(), dw_builder=later))
    held = stages if issubclass(kind, PipelineScheduleMulti) else stages[0]
    return kind(held, microbatches, loss_fn=loss, scale_grads=False)


def run_schedule(schedule: Any, parts: Sequence[Any], inputs: Sequence[Tensor], labels: Tensor, zero: int) -> Tensor:
    """Forward and backward of a step through the schedule; the sum of the microbatches' losses on the rank with the last stage, else 0."""
    managed: list[Any] = [p for p in parts if isinstance(p, FSDPModule) and zero >= 2]
    for part in managed:
        part.set_reshard_after_backward(zero == 3)
    losses: list[Tensor] = []
    first = inputs if any(p.is_first for p in parts) else ()
    last: dict[str, Any] = {"target": labels, "losses": losses} if any(p.is_last for p in parts) else {}
    schedule.step(*first, return_outputs=False, **last)  # or it keeps every microbatch's output
    for part in managed:
        reshard(part)
    return torch.stack(losses).sum().detach() if losses else torch.zeros((), device=labels.device)
