"""MLP-Mixer (Tolstikhin et al. 2021) as a plain nn.Module: what meshwright needs is `build` and `sample`, nothing else."""

from typing import Any

import torch
from torch import Tensor, nn

PATCH, SIDE, CLASSES = 4, 32, 10
TOKENS = (SIDE // PATCH) ** 2


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    """Mixes tokens, then channels. x [batch, tokens, width]"""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm_tokens = nn.LayerNorm(width)
        # a bias per token would move all channels alike, which every later LayerNorm takes out again
        self.mix_tokens = Mlp(tokens, tokens // 2, bias=False)
        self.norm_channels = nn.LayerNorm(width)
        self.mix_channels = Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix_tokens(self.norm_tokens(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mix_channels(self.norm_channels(x))


class Mixer(nn.Module):
    def __init__(self, width: int = 128, depth: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * PATCH * PATCH, width)
        self.blocks = nn.ModuleList(Block(TOKENS, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # [batch, 3, 8, 8, 4, 4]
        x = self.embed(patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2))  # [batch, tokens, width]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def build() -> nn.Module:
    return Mixer()


def sample(batch: int, seq: int) -> dict[str, Any]:
    if seq != TOKENS:
        raise ValueError(f"the mixer sees {TOKENS} patches: use --seq {TOKENS}")
    return {"images": torch.randn(batch, 3, SIDE, SIDE), "labels": torch.randint(0, CLASSES, (batch,))}
