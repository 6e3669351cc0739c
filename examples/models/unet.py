"""A small U-Net as a plain nn.Module: convolutions, group norms, attention at the bottom, skip connections."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 64


class Res(nn.Module):
    """Two convolutions with group norm and a skip. x [batch, c_in, h, w] -> [batch, c_out, h, w]"""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(h))) + self.skip(x)


class Attention(nn.Module):
    """Self-attention over pixels. x [batch, c, h, w]"""

    def __init__(self, c: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, c)
        self.qkv = nn.Linear(c, 3 * c)
        self.out = nn.Linear(c, c)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [batch, pixels, c]
        q, k, v = self.qkv(tokens).view(b, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        return x + self.out(y).transpose(1, 2).view(b, c, h, w)


class UNet(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down1, self.down2 = Res(width, 2 * width), Res(2 * width, 4 * width)
        self.middle, self.attention = Res(4 * width, 4 * width), Attention(4 * width)
        self.up2, self.up1 = Res(8 * width, 2 * width), Res(4 * width, width)
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        a = self.down1(self.first(image))
        b = self.down2(F.avg_pool2d(a, 2))
        h = self.attention(self.middle(F.avg_pool2d(b, 2)))
        h = self.up2(torch.cat([F.interpolate(h, scale_factor=2.0), b], dim=1))
        h = self.up1(torch.cat([F.interpolate(h, scale_factor=2.0), a], dim=1))
        return self.last(h)


def build() -> nn.Module:
    return UNet()


def sample(batch: int, seq: int) -> dict[str, Any]:
    """Images and the noise to predict; a picture has no sequence, so `seq` is not read."""
    return {"image": torch.randn(batch, 3, SIDE, SIDE), "labels": torch.randn(batch, 3, SIDE, SIDE)}
