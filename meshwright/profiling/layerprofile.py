"""A layer profile: what one layer of a model and its two ends were measured to take on a cluster, and plans made of such layers.

It is coarser than a HardwareProfile: the layer is the atom. It says the seconds of a layer's forward by samples per rank, MB by
degree of sequence or tensor parallelism, and the bandwidths between ranks. MB is 2**20 bytes, and a bandwidth of 1 GB/s moves
1 MB in 1 ms: Galvatron, whose profiles these are, divides so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meshwright.profiling.errors import InputError
from meshwright.profiling.files import write_atomically


@dataclass(frozen=True, slots=True)
class Strategy:
    """How the ranks of a stage share a layer: `degree` of tensor parallelism with sequence parallelism (or of Ulysses, which splits
    the sequence and keeps whole parameters) times `data` replicas. `zero`: 0 DDP, 2 or 3; `checkpoint`: the forward runs again."""

    degree: int
    data: int
    ulysses: bool = False
    zero: int = 0
    checkpoint: bool = False

    @property
    def tensor(self) -> int:
        """Ranks that a parameter is cut over by tensor parallelism."""
        return 1 if self.ulysses else self.degree

    @property
    def shards(self) -> int:
        """Ranks that hold the same parameters: over these ZeRO shards and gradients are reduced."""
        return self.data * (self.degree if self.ulysses else 1)

    def __str__(self) -> str:
        split = "" if self.degree == 1 else f"{'ulysses' if self.ulysses else 'tp'}{self.degree} "
        return f"{split}dp{self.data}{f' zero{self.zero}' if self.zero else ''}{' ckpt' if self.checkpoint else ''}"


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """A strategy for every layer. `cut` is how many layers each of the stages holds; `batch` is samples of a step over all ranks."""

    cut: tuple[int, ...]
    microbatches: int
    batch: int
    layers: tuple[Strategy, ...]
    vocab: Strategy  # of the embedding and of the head

    @property
    def stages(self) -> int:
        return len(self.cut)

    def of_stage(self, stage: int) -> tuple[Strategy, ...]:
        start = sum(self.cut[:stage])
        return self.layers[start : start + self.cut[stage]]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerSamples(_Part):
    """One layer. Activations are those that backward needs, of one sample on one rank."""

    forward_s: dict[int, float] = Field(description="samples on a rank -> seconds of one forward of one layer at degree 1")
    parameters_MB: float = Field(description="MB of a layer's fp32 parameters")
    activation_MB: dict[int, float] = Field(description="degree -> MB a sample")
    checkpoint_MB: float = Field(description="MB a sample of a layer that is checkpointed, at degree 1")


class EndSamples(_Part):
    """Memory of the embedding, of the head or of both, on a rank."""

    states_MB: dict[int, float] = Field(description="degree of tensor parallelism -> MB of fp32 parameters, gradient and optimizer")
    activation_MB: dict[int, float] = Field(description="degree -> MB a sample")


class VocabSamples(_Part):
    """Embedding and head: `forward_s` is of both; the memory is of both on one stage, and of each where the pipeline parts them."""

    forward_s: dict[int, float]
    both: EndSamples
    first: EndSamples
    last: EndSamples


class Links(_Part):
    """Bandwidths of a cluster. All-reduce is bus bandwidth by ranks of a group, neighbours (`consecutive`) or strided."""

    nodes: int
    devices_per_node: int
    consecutive_GBps: dict[int, float]
    strided_GBps: dict[int, float]
    p2p_GBps: dict[int, float] = Field(default_factory=dict, description="by pipeline stages")
    allreduce_s: dict[int, dict[int, float]] = Field(default_factory=dict, description="ranks -> MB -> seconds")
    all_to_all_s: dict[int, dict[int, float]] = Field(default_factory=dict, description="ranks -> MB over all ranks -> seconds")

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node


class LayerProfile(_Part):
    """What was measured, and from where. A part that the source does not have is None or empty; `missing` names those."""

    format: Literal["meshwright layer profile 1"] = "meshwright layer profile 1"
    model: str = ""
    precision: str = ""
    sequence: int = 0
    layers: int | None = None
    hidden: int | None = None
    layer: LayerSamples | None = None
    vocab: VocabSamples | None = None
    clusters: list[Links] = Field(default_factory=list)
    overlap: float | None = Field(default=None, description="how many times longer backward and gradient reduction take while they overlap")
    plan: LayerPlan | None = Field(default=None, description="the plan that the source chose for itself")
    plan_limit_MB: float | None = Field(default=None, description="memory of a rank under which it was chosen")
    provenance: dict[str, Any] = Field(default_factory=dict)

    def missing(self) -> list[str]:
        """What pricing needs and the source did not say."""
        have = {
            "the layer's times and memory": self.layer is not None,
            "the times and memory of embedding and head": self.vocab is not None,
            "the number of layers": self.layers is not None,
            "the hidden size": self.hidden is not None,
            "bandwidths": bool(self.clusters),
            "the overlap coefficient": self.overlap is not None,
        }
        return [what for what, there in have.items() if not there]

    def links(self, devices: int) -> Links:
        """The cluster of so many devices, the one of fewest nodes. InputError if none was measured."""
        found = sorted((c for c in self.clusters if c.devices == devices), key=lambda c: c.nodes)
        if not found:
            raise InputError(f"the layer profile has no bandwidths of {devices} devices: it has {[c.devices for c in self.clusters]}")
        return found[0]


def write_layer_profile(profile: LayerProfile, path: Path) -> None:
    """Writes it as YAML."""
    write_atomically(path, yaml.safe_dump(profile.model_dump(mode="json"), sort_keys=False, width=140))


def read_layer_profile(path: Path) -> LayerProfile:
    """Reads what `write_layer_profile` wrote. InputError if it is something else."""
    try:
        return LayerProfile.model_validate(yaml.safe_load(path.read_text()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise InputError(f"{path} cannot be read as YAML: {str(e).splitlines()[0]}") from None
    except ValidationError as e:
        first = e.errors()[0]
        raise InputError(f"{path} is no layer profile: {'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}") from None
