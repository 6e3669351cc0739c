"""What parallelize returns: one module in front of a plain model, of one rank's part of it, or of a dry run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from meshwright.codegen.apply import LossFn, Parallel, make_optimizer, packed_parameters
from meshwright.codegen.dryrun import DryRun, dry_run
from meshwright.codegen.fake import materialise
from meshwright.codegen.runtime.recompute import recompute
from meshwright.codegen.runtime.shards import local, named_tensors
from meshwright.codegen.runtime.tensor_parallel import convert
from meshwright.codegen.runtime.weights import copy_shard
from meshwright.planner.plan import Layout, Plan
from meshwright.profiling import loading
from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import ModelGraph
from meshwright.profiling.live import is_hf, on_meta
from meshwright.profiling.loading import main_output

LOSSES: dict[str, LossFn] = {"cross_entropy": loading.cross_entropy, "mse": loading.mse, "square": loading.square}


class Parallelized(nn.Module):
    """A model that runs as `plan` says. Parameters, buffers, modules and the state have the model's own names; what is not an attribute
    here is looked up in the model."""

    def __init__(self, plan: Plan | None, model: nn.Module, graph: Callable[[], ModelGraph], refusal: str = "") -> None:
        super().__init__()
        self.plan, self._graph, self._refusal = plan, graph, refusal
        self._takes = inspect.signature(type(model).forward)
        self._returns_logits = is_hf(model)
        self.training = model.training

    def _held(self) -> list[nn.Module]:
        """The model's own modules, as far as this process has them."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not name.startswith("_"):
                for model in self._held():
                    if hasattr(model, name):
                        return getattr(model, name)
            raise

    def named_modules(self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
        """This process's modules under the model's own paths."""
        memo = set() if memo is None else memo
        for model in self._held():
            yield from model.named_modules(memo, prefix, remove_duplicate)

    def explain(self, question: str | Mapping[str, Any] | Layout | None = None) -> str:
        """Why the plan is as it is; or, with a choice like "tp=2" or another layout, what that would cost or why it is not possible."""
        from meshwright.planner.explainrun import Explanation, answer, found_in, side, words
        from meshwright.planner.search import Search
        from meshwright.planner.solve import cost_model
        from meshwright.planner.space import Space, held_of, parse_fix
        from meshwright.report.explain import render_explanation
        from meshwright.report.terminal import render_plan

        plan = self.plan
        if plan is None:
            return self._refusal
        if question is None:
            return render_plan(plan)
        if not isinstance(question, str | Mapping | Layout):
            raise InputError(f'explain takes a choice like "tp=2", a dictionary of choices or a Layout, not {type(question).__name__}')
        fix = parse_fix(question) if isinstance(question, str) else held_of(question) if isinstance(question, Layout) else dict(question)
        other = {k: v for k, v in fix.items() if v != getattr(plan.layout, k, None)}
        if not other:
            raise InputError(f"explain names nothing that the plan has not: it is {plan.layout}")
        space = Space(self._graph(), plan.cluster, plan.workload, {}, cost_model("auto", plan.cluster))
        search = Search(space, plan.prediction.memory_bytes.limit)
        best = found_in(search, plan)
        found = answer(search, best, fix).model_copy(update={"fix": words(other)})
        return render_explanation(
            Explanation(
                schema="meshwright.explanation/1", model=plan.model.name, cluster=plan.cluster.name, objective=plan.objective,
                plan=side(search, best), answers=(found,), solver=plan.solver,
            )
        )  # fmt: skip

    def train_step(self, inputs: Mapping[str, Tensor] | tuple[Tensor, ...] | Tensor, labels: Tensor | None = None) -> Tensor:
        """Forward and backward of one optimizer step over all microbatches; gradients are left in the parameters.

        `inputs` (by the names of forward's arguments, or in their order) and `labels` are this data-parallel rank's samples: those from
        data_parallel_rank x B / dp on. Returns the mean loss of the global batch of B.
        """
        if isinstance(inputs, Mapping):
            named = self._named((), dict(inputs))
        else:
            named = self._named(tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {})
        if self.plan is not None:
            what, mine = self.plan.model, self.plan.workload.global_batch // self.plan.layout.dp
            if what.labels is not None and labels is None:
                raise InputError("train_step needs labels: for each output position its class or target (of a causal model, the next token)")
            for name, t in (*named.items(), ("labels", labels)):
                if isinstance(t, Tensor) and len(t) != mine:
                    told = f"{self.plan.workload.global_batch} samples over dp {self.plan.layout.dp}"
                    raise InputError(f"train_step takes the {mine} samples of this rank ({told}); {name} has {len(t)}")
        return self._train(named, labels)

    def _train(self, named: dict[str, Tensor], labels: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """Arguments of the model's forward by the plan's names of its inputs, in their order."""
        if self.plan is None:
            return {**{f"input_{i}": a for i, a in enumerate(args)}, **kwargs}
        wanted = [i.name for i in self.plan.model.inputs]
        if not args and set(kwargs) == set(wanted):
            return {k: kwargs[k] for k in wanted}
        try:
            bound = self._takes.bind(None, *args, **kwargs)
        except TypeError as e:
            raise InputError(f"{self.plan.model.name} takes {', '.join(wanted)}: {e}") from None
        given: dict[str, Any] = {}
        for i, (name, what) in enumerate([*self._takes.parameters.items()][1:]):
            if name in bound.arguments:
                value = bound.arguments[name]
                if what.kind is what.VAR_POSITIONAL:
                    given |= {f"input_{i + j}": v for j, v in enumerate(value)}
                elif what.kind is what.VAR_KEYWORD:
                    given |= value
                elif f"input_{i}" in wanted or value is not what.default:
                    given[f"input_{i}" if f"input_{i}" in wanted else name] = value
        extra = [k for k, v in given.items() if k not in wanted and v is not None]
        missing = [k for k in wanted if k not in given]
        if extra or missing:
            told = f"{extra[0]} was not in its sample" if extra else f"{missing[0]} is missing"
            raise InputError(f"{self.plan.model.name} was planned with {', '.join(wanted)}: {told}")
        return {k: given[k] for k in wanted}

    def _needs_whole_model(self) -> None:
        x = self.plan.layout if self.plan is not None else Layout()
        if x.pp > 1 or x.cp > 1:
            what = f"a part of the pipeline (pp={x.pp})" if x.pp > 1 else f"a part of every sample (cp={x.cp})"
            raise InputError(f"forward has no output here, as this rank computes {what}: call train_step(inputs, labels), which runs the whole step")

    def _as_the_model(self, logits: Tensor) -> Any:
        if not self._returns_logits:
            return logits
        from transformers.utils import ModelOutput

        return ModelOutput(logits=logits)


class InProcess(Parallelized):
    """One process: the plain model. Without a plan (nothing fits, and on_infeasible="warn") a step is one microbatch."""

    def __init__(self, plan: Plan | None, model: nn.Module, graph: Callable[[], ModelGraph], loss: LossFn | None, refusal: str = "") -> None:
        super().__init__(plan, model, graph, refusal)
        self._whole = model
        self._loss = loss or LOSSES.get(plan.model.objective if plan is not None else graph().objective)
        self.data_parallel_rank = 0
        for i, path in enumerate(plan.model.layer_paths if plan is not None else ()):
            assert plan is not None
            recompute(model.get_submodule(path), plan.solution.stages[0].recompute_of(i))

    def _held(self) -> list[nn.Module]:
        return [self._modules["_whole"]] if self._modules.get("_whole") is not None else []  # type: ignore[list-item]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own output."""
        return self._whole(*args, **kwargs)

    def _train(self, named: dict[str, Tensor], labels: Tensor | None) -> Tensor:
        n = self.plan.microbatches if self.plan is not None else 1
        total = torch.zeros((), device=next(iter(named.values())).device)
        parts = zip(*(t.chunk(n) for t in named.values()), labels.chunk(n) if labels is not None else [None] * n, strict=True)
        for *inputs, wanted in parts:
            own = dict(zip(named, inputs, strict=True))
            positional = [own.pop(k) for k in named if k.startswith("input_") and k[6:].isdigit()]
            assert self._loss is not None
            loss = self._loss(main_output(self._whole(*positional, **own)), wanted) / n  # type: ignore[arg-type]
            loss.backward()
            total += loss.detach()
        return total

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The model's own."""
        return self._whole.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self._whole.load_state_dict(*args, **kwargs)

    def make_optimizer(self, lr: float = 1e-3) -> Any:
        """The plan's optimizer, with its state where the plan has it."""
        if self.plan is None:
            return torch.optim.AdamW(self.parameters(), lr=lr)
        return make_optimizer(self.plan, self._whole, lr)

    def clip_gradients(self, most: float) -> Tensor:
        """Scales the gradients to a norm of at most `most`; returns the norm that they had."""
        return nn.utils.clip_grad_norm_(self.parameters(), most)


class OnRanks(Parallelized):
    """One rank of several: its part of the model, sharded. `parallel` is what apply returned."""

    def __init__(self, parallel: Parallel, model: nn.Module, graph: Callable[[], ModelGraph]) -> None:
        super().__init__(parallel.plan, model, graph)
        self.parallel = parallel
        self._stage = parallel.stage
        self.data_parallel_rank = parallel.data_parallel_rank

    def _held(self) -> list[nn.Module]:
        parallel = self.__dict__.get("parallel")
        return [part.model for part in parallel.parts] if parallel is not None else []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output for this rank's samples: the tensor that the loss reads, as `.logits` of a model of transformers."""
        self._needs_whole_model()
        assert self.plan is not None
        out = self._stage(*self._named(args, kwargs).values())
        loss = self.plan.solution.loss
        if loss == "chunked":
            out = self.parallel.parts[0].project(out)  # type: ignore[operator]
        if loss == "vocab_parallel":
            out = convert(out, f"S{out.ndim - 1}>I", self.parallel.mesh["tp"])
        return self._as_the_model(out)

    def _train(self, named: dict[str, Tensor], labels: Tensor | None) -> Tensor:
        return self.parallel.train_step(named, labels)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """This rank's parameters and buffers under the model's own names: DTensors where they are sharded."""
        return {name: t.detach() for name, t in self._tensors().items()}

    def _tensors(self) -> dict[str, Tensor]:
        return {name: t for part in self.parallel.parts for name, t in named_tensors(part).items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Fills this rank's part from whole tensors, or from those that state_dict gave. Names of tensors of other stages are passed over
        where `strict` is not set or the model has them elsewhere; InputError where one of this rank's is missing or of another shape."""
        plan = self.parallel.plan
        packed = packed_parameters(plan)
        for name, t in self._tensors().items():
            names = next((group for group in plan.model.tied if name in group), (name,))
            value = next((state_dict[n] for n in names if n in state_dict), None)
            if value is None and strict:
                raise InputError(f"the state has no {name}, which {plan.model.name} needs")
            if value is None:
                continue
            if value.shape != t.shape:
                raise InputError(f"{name} is {tuple(value.shape)} in the state and {tuple(t.shape)} in {plan.model.name}")
            if type(value) is type(t) and hasattr(value, "to_local"):
                local(t).copy_(local(value))
            else:
                copy_shard(t, value.to(local(t).device), packed.get(name))

    def make_optimizer(self, lr: float = 1e-3) -> Any:
        """The plan's optimizer over this rank's parameters, with its state where the plan has it."""
        return make_optimizer(self.parallel.plan, self._stage, lr)

    def clip_gradients(self, most: float) -> Tensor:
        """Scales the gradients to a norm of at most `most` over the whole model; returns the norm that they had."""
        return self.parallel.clip_gradients(most)


class InDryRun(Parallelized):
    """A plan for ranks that are not here: outputs are fake tensors, and dry_run() says what a rank holds and sends."""

    def __init__(self, plan: Plan, model: nn.Module, graph: Callable[[], ModelGraph], loss: LossFn | None) -> None:
        super().__init__(plan, model, graph)
        self._template, self._loss = model, loss
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._ran: dict[tuple[int | None, bool], DryRun] = {}

    def _held(self) -> list[nn.Module]:
        return [self._modules["_template"]] if self._modules.get("_template") is not None else []  # type: ignore[list-item]

    def dry_run(self, rank: int | None = None, *, whole: bool = False) -> DryRun:
        """A training step as `rank` (by default the first of the fullest stage): its bytes and its communication (codegen.dryrun)."""
        if (rank, whole) not in self._ran:
            assert self.plan is not None
            self._ran[rank, whole] = dry_run(self.plan, rank, whole=whole, model=on_meta(self._template).float().train(), loss=self._loss)
        return self._ran[rank, whole]

    @functools.cached_property
    def _fake(self) -> nn.Module:
        model = on_meta(self._template)
        with self._mode:
            materialise(model, torch.float32)
        return model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """A fake tensor of the output's shape, for one rank's samples."""
        self._needs_whole_model()
        named = self._named(args, kwargs)
        fake = {k: self._mode.from_tensor(t) for k, t in named.items()}
        positional = [fake.pop(k) for k in named if k.startswith("input_") and k[6:].isdigit()]
        with self._mode:
            out = main_output(self._fake(*positional, **fake))
        assert out is not None
        return self._as_the_model(out)

    def _train(self, named: dict[str, Tensor], labels: Tensor | None) -> Tensor:
        self.dry_run()
        with self._mode:
            return torch.zeros(())
