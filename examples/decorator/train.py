"""A small language model that trains in one process or on many ranks: the script is the same."""

import logging
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from meshwright import parallelize

VOCABULARY, TOKENS, BATCH, STEPS = 512, 64, 16, 20


class Block(nn.Module):
    """Attention and a wider part, each beside the stream. x [batch, tokens, width]"""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm_1(x)
        q, k, v = (p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


def batch(step: int) -> dict[str, Tensor]:
    """One optimizer step of counting sequences: {"ids", "labels"}, each [BATCH, TOKENS]."""
    generator = torch.Generator().manual_seed(step)
    start, stride = (torch.randint(1, 8, (BATCH, 1), generator=generator) for _ in range(2))
    counted = (start + stride * torch.arange(TOKENS + 1)) % VOCABULARY
    return {"ids": counted[:, :-1], "labels": counted[:, 1:]}


@parallelize(sample=batch(0), cluster=os.environ.get("CLUSTER"))
class Model(nn.Module):
    def __init__(self, width: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def main() -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("meshwright").setLevel(logging.INFO)
    torch.manual_seed(0)
    model = Model()
    if hasattr(model, "dry_run"):
        record = model.dry_run()
        print(f"rank {record.rank} holds {record.peak_bytes / 2**20:.1f} MiB in {record.phase}")
        return
    optimizer = model.make_optimizer(lr=1e-3)
    share = BATCH // model.plan.layout.dp
    mine = slice(model.data_parallel_rank * share, (model.data_parallel_rank + 1) * share)
    for step in range(STEPS):
        samples = {name: x[mine] for name, x in batch(step).items()}
        loss = model.train_step({"ids": samples["ids"]}, samples["labels"])
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, STEPS - 1) and (not dist.is_initialized() or dist.get_rank() == 0):
            print(f"step {step} loss {loss.item():.4f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
