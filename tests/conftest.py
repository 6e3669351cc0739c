"""Shared fixtures: one tiny Llama, written and traced once per session."""

from __future__ import annotations

import json
import os
from pathlib import Path

if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in Triton's interpreter; it must be told before torch is imported

import pytest
from tiny import SEQ, TINY
from transformers import LlamaConfig

from meshwright.profiling.graph import ModelGraph
from meshwright.profiling.trace import trace

# Files that take longest come first, so that two workers end at the same time
LONGEST = ("planner/test_search.py", "costmodel/test_memory.py", "parity/test_parity.py", "codegen/test_dryrun.py", "codegen/test_dryrun_truth.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((n for n, name in enumerate(LONGEST) if str(item.path).endswith(name)), len(LONGEST)))


@pytest.fixture(scope="session")
def tiny_llama_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config.json of a tiny Llama: 4 layers of width 64, 8 heads, 4 key-value heads."""
    path = tmp_path_factory.mktemp("models") / "llama.json"
    config = LlamaConfig(**TINY)
    config.architectures = ["LlamaForCausalLM"]
    path.write_text(json.dumps(config.to_dict(), default=str))
    return path


@pytest.fixture(scope="session")
def tiny_llama(tiny_llama_config: Path) -> ModelGraph:
    """The tiny Llama traced in fp32 at sequence 32."""
    return trace(str(tiny_llama_config), seq=SEQ, precision="fp32")
