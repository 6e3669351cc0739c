"""Peak memory of a run: closed forms computed by hand, laws that hold for every run, and schedules' own counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.costmodel.allocator import constants
from meshwright.costmodel.runmemory import GIB, fits, in_flight, metric_of, peak, peak_bytes
from meshwright.costmodel.runs import Run, parse
from meshwright.costmodel.schedules import SCHEDULES, find

pytest.importorskip("transformers")

GPT = {"layers": 16, "hidden": 2048, "ffn_hidden": 8192, "heads": 16, "vocab": 32768, "gated_mlp": False, "tied_embeddings": False, "seq_len": 1024}
LLAMA = {"layers": 8, "hidden": 2048, "ffn_hidden": 5632, "heads": 16, "kv_heads": 4, "vocab": 65536, "gated_mlp": True, "tied_embeddings": False,
         "seq_len": 4096}  # fmt: skip
BASE = {"id": "a", "gpu": "A100-80GB-SXM", "micro_batch": 2, "recompute": "none", "precision": "bf16"}
MEGATRON = BASE | GPT | {"software": "megatron-lm", "release": "2023", "n_gpus": 8, "pp": 8, "global_batch": 64, "zero_stage_or_fsdp": "none"}
TITAN = BASE | LLAMA | {"software": "torchtitan", "release": "2024", "gpu": "H100-80GB-SXM", "n_gpus": 16, "global_batch": 32,
                        "zero_stage_or_fsdp": "fsdp2", "recompute": "selective"}  # fmt: skip


def run(cells: dict[str, object], **more: object) -> Run:
    return parse({k: str(v) for k, v in (cells | more).items()}, "runs.csv, row 2")


def test_a_pipeline_stage_by_hand() -> None:
    """1F1B, 8 stages of 2 layers: the first holds 8 microbatches x 2 layers x 34 bytes x tokens x hidden, 16 bytes a parameter of its
    layers (12 h^2 and norms) and of the embedding, and the gradients of one layer's backward."""
    h, tokens = 2048, 2 * 1024
    found = peak(run(MEGATRON))
    assert (found.rank, found.moment, found.metric) == (0, "backward", "allocated")
    assert found.parts["activations"] == pytest.approx(8 * 2 * 34 * tokens * h)
    assert found.parts["states"] == pytest.approx(16 * (2 * 12 * h**2 + 32768 * h), rel=0.01)
    assert found.parts["one layer's backward"] == pytest.approx((4 + 4 * 4) * tokens * h)
    assert peak_bytes(run(MEGATRON)) == pytest.approx(found.live + constants().workspace[False][0])


def test_a_large_table_moves_the_peak_to_its_gradient() -> None:
    """With 262,144 words and short sequences the 16-bit gradient of the table is more than the microbatch that is freed before it."""
    found = peak(run(MEGATRON, vocab=262144, micro_batch=1, seq_len=256))
    assert (found.moment, found.rank) == ("table", 0)
    assert found.parts["gradient of the table"] == 2 * 262144 * 2048


def test_the_loss_of_a_sharded_model_by_hand() -> None:
    """FSDP2 with op-level recompute, eager: 12 bytes a parameter over 16 ranks (gradients are not there yet), the layer's input and the
    outputs of q, v, gate, down and attention, 12 bytes a logit, both tables and a layer gathered in 16 bits."""
    h, f, kv, tokens, vocab = 2048, 5632, 512, 2 * 4096, 65536
    layer = 2 * h * h + 2 * h * kv + 3 * h * f
    found = peak(run(TITAN))
    assert (found.moment, found.metric) == ("loss", "reserved")
    assert found.parts["states"] == pytest.approx(12 * (8 * layer + 2 * vocab * h) / 16, rel=0.01)
    assert found.parts["activations"] == pytest.approx(8 * tokens * 2 * (h + h + kv + f + h + h))
    assert found.parts["logits"] == pytest.approx(tokens * (12 * vocab + 8 * h))
    assert found.parts["gathered"] == pytest.approx(2 * (2 * vocab * h + layer), rel=0.01)


def test_a_compiler_drops_what_backward_does_not_read() -> None:
    """The last product's output, 2 h a token and layer, is saved by the policy and read by nothing."""
    eager, compiled = (peak(run(TITAN, software=s)).parts["activations"] for s in ("torchtitan-eager", "torchtitan-compile"))
    assert eager - compiled == pytest.approx(8 * 2 * 4096 * 2 * 2048)


def test_chunks_of_the_loss_are_smaller_than_all_of_it() -> None:
    """A chunked loss keeps 16-bit logits and their gradient; a fused head and loss keep next to nothing."""
    whole, chunked, fused = (peak(run(TITAN, notes=n)).live for n in ("", "chunked cross entropy", "Liger fused linear cross entropy"))
    assert whole > chunked > fused


@pytest.mark.parametrize("metric", ["p50", "p95"])
def test_more_tokens_need_more_and_more_ranks_less(metric: str) -> None:
    """Rises with the microbatch; falls with tensor parallelism, with recompute and with sharding."""
    more = [getattr(peak(run(MEGATRON, micro_batch=b)), metric) for b in (1, 2, 4)]
    assert more == sorted(set(more))
    wide = [getattr(peak(run(MEGATRON, tp=t, n_gpus=8 * t)), metric) for t in (1, 2, 4, 8)]
    assert wide == sorted(set(wide), reverse=True)
    less = [getattr(peak(run(MEGATRON, recompute=r)), metric) for r in ("none", "full")]
    assert less[0] > less[1]
    shard = [getattr(peak(run(MEGATRON, pp=1, zero_stage_or_fsdp=z, global_batch=16)), metric) for z in ("none", "zero1", "zero2", "zero3")]
    assert shard == sorted(shard, reverse=True)


@pytest.mark.parametrize("name", ["1F1B", "GPipe", "ZB-1p", "ZB-2p", "ZB-V", "V-Half", "V-Min", "DualPipe-V"])
@pytest.mark.parametrize("rank", [0, 1, 7])
def test_in_flight_is_the_schedules_own(name: str, rank: int) -> None:
    """The same counts as the order of events that the simulator runs."""
    r = run(MEGATRON, schedule=name, global_batch=64)
    s = SCHEDULES[name]
    assert find(r.schedule) is s
    assert in_flight(r, s, rank) == min(32.0, s.in_flight(8, rank, 32, 2 if s.shape == "V" else 1))


def test_schedules_rank_by_what_they_hold() -> None:
    """V-Min < V-Half < 1F1B < interleaved < ZB-2p < GPipe, with 32 microbatches on 8 stages."""
    peaks = [peak(run(MEGATRON, schedule=s)).parts["activations"] for s in ("V-Min", "V-Half", "1F1B", "interleaved", "ZB-2p", "GPipe")]
    assert peaks == sorted(set(peaks))


def test_an_interlaced_loss_holds_half_as_much_again() -> None:
    """Words of the run's own schedule that the schedule of its step time does not know."""
    plain, more = (peak(run(MEGATRON), schedule=s).parts["activations"] for s in ("1F1B", "interlaced-1F1B"))
    assert more == pytest.approx(1.5 * plain)


def test_adapters_need_no_states_of_the_base() -> None:
    """LoRA keeps 16-bit weights, QLoRA 4-bit layers, and neither gradients nor moments of them."""
    full, lora, qlora = (peak(run(TITAN, n_gpus=1, global_batch=2, zero_stage_or_fsdp="none", task=t)) for t in ("full-ft", "lora", "qlora"))
    params = 8 * (2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 5632) + 2 * 65536 * 2048
    assert lora.parts["states"] == pytest.approx(2 * params, rel=0.01)
    assert full.parts["states"] > lora.parts["states"] > qlora.parts["states"] > 0.25 * lora.parts["states"]


def test_the_metric_is_what_the_run_says_or_its_engine_prints() -> None:
    """nvidia-smi and unknown methods are the driver's view."""
    expected = {"nvidia-smi": "device", "method not stated": "device", "max_memory_reserved": "reserved", "peak memory active": "allocated"}
    assert {m: metric_of(run(MEGATRON, mem_metric=m)) for m in expected} == expected
    assert metric_of(run(MEGATRON)) == "allocated"
    assert metric_of(run(TITAN)) == "reserved"


def test_figures_are_ordered() -> None:
    """allocated <= reserved <= device, p50 <= p95."""
    for cells in (MEGATRON, TITAN):
        r = peak(run(cells)).reported
        assert r.allocated[0] < r.reserved[0] < r.device[0]
        assert all(low <= high for low, high in (r.allocated, r.reserved, r.device))


def test_a_run_fits_its_device_or_not() -> None:
    """The same run on a device of its allocated bytes does not fit, and on twice as much it does."""
    r = run(MEGATRON)
    found = peak(r)
    tight, roomy = (replace(r, device=replace(r.device, memory_GiB=share * found.live / GIB)) for share in (1.0, 2.0))
    assert not fits(tight, found)
    assert fits(roomy, found)
