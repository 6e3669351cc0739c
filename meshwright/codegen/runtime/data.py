"""Training data from a file of token ids, one sample after another, the same for any layout."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .shards import Refused


class TokenFile:
    """Samples of seq + 1 tokens from a file: .npy of any integer type, or raw uint16 (uint32 where its name ends in .u32 or .bin32).

    Raises Refused where it is not there, is too short for one sample, or has a token that is not below `vocabulary`.
    """

    def __init__(self, path: str | Path, seq: int, vocabulary: int) -> None:
        self.path = path = Path(path)
        if not path.is_file():
            raise Refused(f"the data file {path} does not exist")
        self.vocabulary, wide = vocabulary, path.suffix in (".u32", ".bin32")
        self.tokens = np.load(path, mmap_mode="r") if path.suffix == ".npy" else np.memmap(path, np.uint32 if wide else np.uint16, "r")
        self.seq, self.samples = seq, (self.tokens.size - 1) // seq
        if self.samples < 1:
            raise Refused(f"{path} has {self.tokens.size:,} tokens, which is no sample of {seq} and the token after it")

    def rows(self, first: int, count: int) -> Tensor:
        """Samples [first, first + count), from the start again after the last. [count, seq + 1]"""
        starts = [(first + i) % self.samples * self.seq for i in range(count)]
        rows = torch.stack([torch.from_numpy(np.asarray(self.tokens[s : s + self.seq + 1], dtype=np.int64)) for s in starts])
        if int(rows.max()) >= self.vocabulary:
            raise Refused(f"{self.path} has token {int(rows.max())}, and the model knows those below {self.vocabulary}")
        return rows
