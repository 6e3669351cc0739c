"""The table of engines: every fact has a source, and a run's engine is found from what the run says."""

from __future__ import annotations

from dataclasses import fields

import pytest

from meshwright.costmodel.engines import ENGINES, Engine, build, release_year, resolve, sources


@pytest.mark.parametrize("name", list(ENGINES))
def test_every_fact_of_every_engine_has_a_source(name: str) -> None:
    """No value in the table stands without saying where it comes from."""
    found = sources(name)
    assert {f.name for f in fields(Engine)} - {"name"} == set(found)
    assert all(len(s) > 3 for s in found.values())
    assert build(name).name == name


@pytest.mark.parametrize(
    ("software", "release", "year", "attention", "zero"),
    [
        ("megatron-lm-2020", "2020", None, "unfused", "none"),
        ("megatron-lm", "2023", None, "fa2", "none"),
        ("megatron-core-te", "25.11", None, "native", "zero1"),
        ("composer-fsdp1-eager", "2023", None, "fa1", "zero3"),
        ("torchtitan-compile", "2025", None, "fa2", "zero3"),
        ("Megatron_LM", "", 2021, "unfused", "none"),
        ("megatron-lm-2023-unfused-attention", "2023", None, "unfused", "none"),
    ],
)
def test_software_and_release_name_the_engine(software: str, release: str, year: float | None, attention: str, zero: str) -> None:
    """The era of a family decides its attention kernel and its sharding; words in the name override a fact."""
    engine, known = resolve(software, release, year)
    assert known
    assert (engine.attention, engine.zero) == (attention, zero)


@pytest.mark.parametrize("year", [2019, 2021, 2022, 2023, 2024, 2025, 2027, None])
@pytest.mark.parametrize("model_parallel", [True, False])
def test_unknown_software_is_like_its_year(year: float | None, model_parallel: bool) -> None:
    """A name that nobody knows still gets an engine: one that splits models, or one that shards data-parallel states."""
    engine, known = resolve("in-house trainer", "", year, model_parallel=model_parallel)
    assert not known
    assert (engine.zero == "zero3") != model_parallel


def test_notes_state_options() -> None:
    """Compile, async TP and eager in the notes change the facts that they name, and a negation does not."""
    plain = resolve("torchtitan", "2025")[0]
    assert plain.fusion == "eager"
    assert resolve("torchtitan", "2025", notes="FSDP + compile")[0].fusion == "compiled"
    assert resolve("torchtitan", "2025", notes="no compile")[0].fusion == "eager"
    assert not plain.overlap_tp
    assert resolve("torchtitan", "2025", notes="async TP, bf16")[0].overlap_tp
    assert resolve("torchtitan-compile", "2025", notes="eager")[0].name == "fsdp2"


@pytest.mark.parametrize(
    ("release", "software", "year", "expected"),
    [
        ("25.11", "", None, 2025 + 10 / 12),
        ("2023", "", None, 2023.5),
        ("", "engine-2022", 2024, 2022.5),
        ("v0.9", "", 2024, 2024.5),
        ("", "", None, None),
    ],
)
def test_release_is_a_date(release: str, software: str, year: float | None, expected: float | None) -> None:
    """A monthly container, a bare year, a year in the name, or the row's year."""
    assert release_year(release, software, year) == pytest.approx(expected)
