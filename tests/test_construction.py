"""A class recorded without its memory gives, tensor by tensor, exactly the weights that its constructor would have left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from meshwright.construction import _seed, construct
from meshwright.profiling.errors import InputError

SEED = 5


class Seeded(TorchDispatchMode):
    """Real construction with every random operator seeded as a recorded one is."""

    def __init__(self) -> None:
        super().__init__()
        self.draws = 0

    def seed(self) -> None:
        torch.manual_seed(_seed(SEED, self.draws))
        self.draws += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.seed()
        return func(*args, **(kwargs or {}))


class Awkward(nn.Module):
    """Weights that no reset_parameters makes: drawn in place, scaled later, transposed, tied, orthogonal, from a list."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(4, 8) * 0.1)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.tril(torch.ones(4, 4)))
        self.register_buffer("listed", torch.tensor([1.0, 2.0]), persistent=False)
        self.frequencies = torch.arange(4) / 3
        self.apply(self._draw)
        for name, p in self.named_parameters():
            if name.endswith("2.weight"):
                nn.init.normal_(p, std=0.01)
        with torch.no_grad():
            self.layers[0].weight[2:4].zero_()
        self.layers[1].weight.data = self.layers[1].weight.data.t().contiguous() * 3
        nn.init.orthogonal_(self.layers[2].weight)
        self.norm, self.attention = nn.BatchNorm1d(8), nn.MultiheadAttention(8, 2)

    def _draw(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    )


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32))


def _vit() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))


def _real(make: Callable[[], nn.Module]) -> nn.Module:
    seeded, drawn = Seeded(), nn.init._no_grad_trunc_normal_

    def whole(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.utils._python_dispatch._disable_current_modes():
            seeded.seed()
            return drawn(tensor, *args, **kwargs)

    with mock.patch.object(nn.init, "_no_grad_trunc_normal_", whole), seeded:
        return make()


@pytest.mark.parametrize("make", [Awkward, _llama, _gpt2, _vit], ids=["plain", "llama", "gpt2", "vit"])
def test_recorded_weights_are_the_constructors_own(make: Callable[[], nn.Module]) -> None:
    """Every parameter, buffer and plain tensor, bit for bit, in any order and without moving the random stream."""
    stream = torch.get_rng_state()
    made = construct(make, "model")
    names = [n for n, _ in (*made.template.named_parameters(), *made.template.named_buffers())]
    names += [f"{path}.{name}" if path else name for path, name in made.attributes]
    values = {n: made.value(n, SEED) for n in reversed(names)}
    assert torch.equal(torch.get_rng_state(), stream)

    real = _real(make)
    assert set(names) >= {n for n, _ in (*real.named_parameters(), *real.named_buffers())}
    for name, value in values.items():
        owner, _, leaf = name.rpartition(".")
        assert torch.equal(value, getattr(real.get_submodule(owner), leaf)), name


def test_the_template_is_on_meta_with_its_ties_and_names() -> None:
    """What is sharded has the module's own structure, and no memory."""
    template: Any = construct(Awkward, "Awkward").template
    assert all(t.is_meta for t in (*template.parameters(), *template.buffers(), template.frequencies))
    assert template.head.weight is template.embed.weight
    assert list(template.state_dict()) == list(Awkward().state_dict())


def test_another_seed_gives_other_weights() -> None:
    """And the same seed the same."""
    made = construct(Awkward, "Awkward")
    assert torch.equal(made.value("position", 1), made.value("position", 1))
    assert not torch.equal(made.value("position", 1), made.value("position", 2))
    assert not torch.equal(made.value("layers.0.weight", 1), made.value("layers.1.weight", 1))


def test_a_constructor_that_reads_values_is_refused() -> None:
    """In one sentence that says what to do instead."""
    with pytest.raises(InputError, match="Net cannot be constructed without its memory: .*; decorate an instance of it instead"):
        construct(lambda: nn.Linear(2, int(torch.randint(1, 4, ()))), "Net")
