"""What a loss holds: the plain one as traced, the chunked one against a tracked run of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from meshwright.codegen.runtime.loss import chunked_cross_entropy
from meshwright.codegen.tracker import Tracker
from meshwright.costmodel.memory import block_memory
from meshwright.costmodel.sharded import ShardedBlock
from meshwright.profiling.trace import trace

ROWS, WIDTH, CLASSES = 512, 64, 32000
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": CLASSES, "max_position_embeddings": ROWS, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize("chunks", [1, 3, 8])
def test_a_chunked_loss_is_the_loss(chunks: int) -> None:
    """The value and the gradients of the loss do not depend on the number of parts."""
    torch.manual_seed(0)
    head = nn.Linear(16, 50)
    hidden, labels = torch.randn(2, 12, 16, requires_grad=True), torch.randint(0, 50, (2, 12))
    whole = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten())
    wanted = torch.autograd.grad(whole, [hidden, head.weight])
    loss = chunked_cross_entropy(hidden, head, labels, chunks)
    found = torch.autograd.grad(loss, [hidden, head.weight])
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("chunks", [1, 2, 4, 8])
def test_memory_of_the_head_is_that_of_a_tracked_run(chunks: int, tmp_path: Path) -> None:
    """The head's peak under a loss in parts, where logits outweigh all else, is that of a tracked run in bf16, within 2 %."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    graph = trace(str(path), seq=ROWS, precision="bf16")
    block = graph.blocks[graph.sequence[-1].block]
    memory = block_memory(ShardedBlock.whole(block), np.array([1.0]), loss_chunks=chunks)

    tracker = Tracker()
    with FakeTensorMode():
        head = nn.Linear(WIDTH, CLASSES, bias=False, dtype=torch.bfloat16)
        hidden = torch.zeros(1, ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.zeros(1, ROWS, dtype=torch.long)
        tracker.tell("parameters", [head.weight, hidden, labels])
        held = tracker.live_bytes
        with tracker:
            if chunks > 1:
                loss = chunked_cross_entropy(hidden, head, labels, chunks)
            else:
                loss = F.cross_entropy(head(hidden).float().flatten(0, 1), labels.flatten())
            loss.backward()
    peak = max(memory.forward[0], memory.backward[0])
    assert peak == pytest.approx(tracker.peak().live_bytes - held, rel=0.02)
    if chunks > 1:
        assert memory.saved[0] < ROWS * WIDTH * 20  # no logits
