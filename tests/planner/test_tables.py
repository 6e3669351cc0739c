"""The code around the layers on a rank that has some of the tokens: what is made for all of them is cut, and what cannot be is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshwright.planner.plan import Layout, StageProgram
from meshwright.planner.shardedmodel import shard_model
from meshwright.planner.tables import stage_program
from meshwright.planner.token_dims import no_token_dims, token_dims
from meshwright.profiling.graph import ModelGraph
from meshwright.profiling.trace import trace

TOKENS, LONGEST, WIDTH, CP = 16, 64, 24, 2
# How a model brings positions to its tokens, in and around its layers, and what its head does: (fields, __init__, forward, layer)
_MODEL = '''
import torch
from torch import nn
from torch.nn import functional as F


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm({width}), nn.Linear({width}, {width} * 3), nn.Linear({width}, {width})
        self.register_buffer("own", torch.arange({longest} * 6.0).reshape({longest}, 6) / 1000)

    def forward(self, x, table=None):
        b, t, w = x.shape
        q, k, v = (y.view(b, t, 4, 6).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        if table is not None:
            q, k = q + table, k + table
        {layer}
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).reshape(b, t, w))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(48, {width}), nn.Linear({width}, 48)
        self.positions, self.exact = nn.Embedding({longest}, {width}), nn.Parameter(torch.ones(1, {tokens}, {width}))
        self.register_buffer("table", torch.arange({longest} * 6.0).reshape({longest}, 6) / 1000)
        self.register_buffer("whole", torch.arange({tokens} * 6.0).reshape({tokens}, 6) / 1000)
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, ids):
        t = ids.shape[1]
        x, table = self.embed(ids), None
        {stem}
        for layer in self.layers:
            x = layer(x, table) if table is not None else layer(x)
        {head}
        return self.head(x)


def build():
    return Model()


def sample(batch, seq):
    return torch.randint(0, 48, (batch, seq))
'''
RUNS = {
    "arange": {"stem": "x = x + self.positions(torch.arange(t, device=ids.device))"},
    "arange_viewed": {"stem": "x = x + self.positions(torch.arange(t, device=ids.device)).view(1, t, -1)"},
    "parameter": {"stem": "x = x + self.exact"},
    "slice": {"stem": "table = self.table[:t]"},
    "buffer": {"stem": "table = self.whole"},
    "outer": {"stem": "table = torch.outer(torch.arange(t, device=ids.device).float(), torch.ones(6, device=ids.device)).sin()"},
    "reshaped": {"stem": f"x = x.view(-1, {TOKENS}, {WIDTH})", "head": f"x = x.reshape(-1, {WIDTH}).view(-1, {TOKENS}, {WIDTH})"},
}
REFUSED = {
    "makes its own positions": {"layer": "q, k = q + self.own[:t], k + self.own[:t]"},
    "aten.mean.dim of head joins tokens": {"head": "x = x + x.mean(1, keepdim=True)"},
    "aten.roll.default of head joins tokens": {"head": "x = x + x.roll(1, 1)"},
    "aten.cumsum.default of layers.0 joins tokens": {"layer": "v = v.cumsum(2)"},
    "aten.flip.default of layers.0 joins tokens": {"layer": "x = x + x.flip(1)"},
    "aten.slice.Tensor of stem joins tokens": {"stem": "x = torch.cat([x[:, :1], x[:, :-1]], 1)"},
}


def _trace(folder: Path, parts: dict[str, str]) -> tuple[ModelGraph, str]:
    fields: dict[str, Any] = {"width": WIDTH, "longest": LONGEST, "tokens": TOKENS, "layer": "", "stem": "", "head": ""}
    path = folder / "positions.py"
    text = _MODEL
    for k, v in {**fields, **parts}.items():
        text = text.replace("{" + k + "}", str(v))
    path.write_text(text)
    return trace(f"{path}:build", seq=TOKENS, precision="fp32"), f"{path}:build"


def _program(graph: ModelGraph) -> StageProgram:
    made = stage_program(graph, shard_model(graph, 1, False), Layout(cp=CP, micro_batch=1))
    assert made is not None
    return made


def _run(program: StageProgram, model: nn.Module, ids: Tensor, cut: slice) -> Tensor:
    """The program up to the layers' arguments and from there on, without layers: `cut` is what a rank keeps of a sequence."""
    from meshwright.codegen import stage

    def slice_tokens(x: Tensor, dim: int, mesh: Any, kind: str) -> Tensor:
        return x.narrow(dim, cut.start, cut.stop - cut.start)

    env: dict[str, Any] = {program.inputs[0]: ids}
    part = stage.ProgramStage.__new__(stage.ProgramStage)
    nn.Module.__init__(part)
    part.model, part.program, part.mesh, part.cp_kind = model, program, {"cp": None}, "ulysses"  # type: ignore[assignment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "slice_tokens", slice_tokens)
        part._run(program.stem, env)
        part._run(program.side, env)
        args, kwargs = part._call(program.layer_args, program.layer_kwargs, env)
        for x in (*args[1:], *kwargs.values()):  # a layer's other arguments, joined to each token as a layer would
            env["h"] = env["h"] + x.sum(-1, keepdim=True)
        part._run(program.head, env)
    return env[program.output]  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", RUNS)
def test_every_rank_gives_its_tokens_the_positions_that_they_have(how: str, tmp_path: Path) -> None:
    """The code around the layers on parts of a sequence is the parts of what it is on the whole."""
    graph, source = _trace(tmp_path, RUNS[how])
    from meshwright.profiling.loading import import_target

    torch.manual_seed(0)
    model = import_target(source)[1]()
    ids = torch.randint(0, 48, (1, TOKENS))
    assert graph.program is not None
    plain = stage_program(graph, shard_model(graph, 1, False), Layout())
    assert plain is not None
    whole = _run(plain, model, ids, slice(0, TOKENS))
    for rank in range(CP):
        mine = slice(rank * TOKENS // CP, (rank + 1) * TOKENS // CP)
        assert torch.equal(_run(_program(graph), model, ids[:, mine], mine), whole[:, mine])


@pytest.mark.parametrize("why", REFUSED)
def test_a_model_whose_tokens_cannot_be_cut_says_why(why: str, tmp_path: Path) -> None:
    graph, _ = _trace(tmp_path, REFUSED[why])
    assert why in no_token_dims(graph)


def test_positions_are_cut_where_they_are_made(tmp_path: Path) -> None:
    graph, _ = _trace(tmp_path, RUNS["arange"])
    assert token_dims(graph).made == {"arange": 0}
    targets = [s.target for s in _program(graph).stem]
    assert targets[targets.index("aten:arange.default") + 1] == "context:0"
