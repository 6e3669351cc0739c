"""Small made-up layer profiles: tables of a cluster and a model that no one measured."""

from __future__ import annotations

import random

from meshwright.profiling.layerprofile import EndSamples, LayerProfile, LayerSamples, Links, VocabSamples


def profile(devices: int = 4, layers: int = 4, seed: int | None = None, activation_MB: float = 100.0) -> LayerProfile:
    """A profile with all figures; with a seed, each one off by up to half. `activation_MB`: of a sample in a layer."""
    rng = random.Random(seed)

    def about(value: float) -> float:
        return value if seed is None else value * rng.uniform(0.5, 1.5)

    degrees = [d for d in (1, 2, 4, 8) if d <= devices]
    ends = {
        name: EndSamples(states_MB={d: about(400 / d) for d in degrees}, activation_MB={d: about(40 / d) for d in degrees})
        for name in ("both", "first", "last")
    }
    forward, more = about(0.004), about(0.001)
    sizes = [1, 2, 4, 8, 16, 32, 64]
    return LayerProfile(
        model="made-up", precision="bf16", sequence=512, layers=layers, hidden=1024, overlap=1.0 + about(0.1),
        layer=LayerSamples(
            forward_s={b: b * forward + more for b in (1, 2, 4)}, parameters_MB=about(200),
            activation_MB={d: about(activation_MB / d) for d in degrees}, checkpoint_MB=about(10),
        ),
        vocab=VocabSamples(forward_s={b: b * forward / 2 for b in (1, 2, 4)}, **ends),
        clusters=[
            Links(
                nodes=1, devices_per_node=devices,
                consecutive_GBps={d: about(50) for d in degrees if d > 1}, strided_GBps={d: about(30) for d in degrees if d > 1},
                p2p_GBps={d: about(20) for d in degrees if d > 1},
                allreduce_s={d: {s: about(0.0001 + s * 5e-5) for s in sizes} for d in degrees if d > 1},
                all_to_all_s={d: {s: about(0.0001 + s * 2e-5) for s in sizes} for d in degrees if d > 1},
            )
        ],
    )  # fmt: skip
