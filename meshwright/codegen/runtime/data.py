"""Training data from a file of token ids, one sample after another, the same for any layout."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class TokenFile:
    """Samples of seq + 1 tokens from a file: .npy of any integer type, or raw uint16 (uint32 where its name ends in .u32 or .bin32).

    Raises ValueError where it is too short for one sample.
    """

    def __init__(self, path: str | Path, seq: int) -> None:
        path = Path(path)
        wide = path.suffix in (".u32", ".bin32")
        self.tokens = np.load(path, mmap_mode="r") if path.suffix == ".npy" else np.memmap(path, np.uint32 if wide else np.uint16, "r")
        self.seq, self.samples = seq, (self.tokens.size - 1) // seq
        if self.samples < 1:
            raise ValueError(f"{path} has {self.tokens.size:,} tokens, which is no sample of {seq} and the token after it")

    def rows(self, first: int, count: int) -> Tensor:
        """Samples [first, first + count), from the start again after the last. [count, seq + 1]"""
        starts = [(first + i) % self.samples * self.seq for i in range(count)]
        return torch.stack([torch.from_numpy(np.asarray(self.tokens[s : s + self.seq + 1], dtype=np.int64)) for s in starts])
