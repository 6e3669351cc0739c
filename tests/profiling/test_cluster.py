"""Clusters from a word or a YAML file, and what a wrong one is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from meshwright.profiling.cluster import devices, parse_cluster
from meshwright.profiling.errors import InputError


@pytest.mark.parametrize(("spec", "size", "nodes"), [("8xH100-SXM", 8, 1), ("16x8xH100-SXM", 128, 16), ("H100-SXM", 1, 1), ("2x4xh100", 8, 2)])
def test_a_word_is_a_cluster(spec: str, size: int, nodes: int) -> None:
    """ "8xH100-SXM" is one node of eight, "16x8xH100-SXM" sixteen of them, in any case and by alias."""
    cluster = parse_cluster(spec)
    assert (cluster.size, len(set(cluster.node_of))) == (size, nodes)
    assert cluster.device.name == "H100-SXM"


def test_cpu_ranks_share_the_machine() -> None:
    """Four CPU ranks have a quarter of this machine's memory each."""
    cluster = parse_cluster("4xcpu")
    assert (cluster.size, cluster.device.kind) == (4, "cpu")
    assert cluster.device.memory_bytes == pytest.approx(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4)


@pytest.mark.parametrize("name", sorted(devices()))
def test_every_built_in_device_is_a_cluster(name: str) -> None:
    """Every built-in device can be named in a cluster."""
    assert parse_cluster(f"2x{name}").device.name == name


def test_a_file_is_a_cluster(tmp_path: Path) -> None:
    """A YAML file mixes nodes and sets links; the slowest device and least memory stand for all, a crossing group spans nodes."""
    path = tmp_path / "lab.yaml"
    path.write_text(
        "nodes:\n  - {device: H100-SXM, devices: 4}\n  - {device: A100-SXM-40GB, devices: 4, count: 2}\n"
        "links:\n  network: {bandwidth_Bps: 1.0e+9, latency_s: 1.0e-5}\n"
    )
    cluster = parse_cluster(str(path))
    assert (cluster.name, cluster.size, cluster.mixed, cluster.device.name) == ("lab", 12, True, "A100-SXM-40GB")
    assert cluster.network_link.bandwidth_Bps == 1e9
    group = cluster.group([0, 1, 4, 8])
    assert (group.size, group.nodes, group.per_node) == (4, 3, 2)


def test_measured_pairs_replace_the_tier(tmp_path: Path) -> None:
    """A measured bandwidth matrix decides a group's bandwidth: its slowest neighbours."""
    path = tmp_path / "measured.yaml"
    path.write_text("nodes: [{device: H100-SXM, devices: 3}]\nbandwidth_Bps: [[1, 5.0e+9, 2.0e+9], [5.0e+9, 1, 3.0e+9], [2.0e+9, 3.0e+9, 1]]\n")
    cluster = parse_cluster(str(path))
    assert cluster.group([0, 1]).node_link.bandwidth_Bps == 5e9
    assert cluster.group([0, 1, 2]).node_link.bandwidth_Bps == 2e9


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("8xH200X", "unknown device 'H200X': the built-in devices are "),
        ("-8xH100-SXM", "counts of nodes and devices must be at least 1"),
        ("0xH100-SXM", "counts of nodes and devices must be at least 1"),
        ("2x-4xH100-SXM", "counts of nodes and devices must be at least 1"),
        ("8 H100", "is neither like 8xH100-SXM"),
        ("", "is neither like 8xH100-SXM"),
    ],
)
def test_wrong_words_are_told_what_is_right(spec: str, words: str) -> None:
    """A word that is no cluster is refused in one sentence that says what would be right."""
    with pytest.raises(InputError) as caught:
        parse_cluster(spec)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nodes: [{device: H100-SXM, devices: 8, sauce: 1}]", "nodes.0.sauce is not a known key"),
        ("nodes: [{device: H100-SXM, devices: -8}]", "nodes.0.devices: input should be greater than 0"),
        ("nodes: [{device: H100-SXM}]", "nodes.0.devices is missing"),
        ("nodes: []", "nodes: "),
        ("name: x", "nodes is missing"),
        ("nodes: [{device: Z9000, devices: 8}]", "unknown device 'Z9000'"),
        ("nodes: [{device: H100-SXM, devices: 2}]\nlinks: {node: {bandwidth_Bps: -1, latency_s: 0}}", "links.node.bandwidth_Bps: "),
        ("nodes: [{device: H100-SXM, devices: 2}]\nbandwidth_Bps: [[1.0]]", "must be 2 rows of 2 numbers"),
        ("nodes: [{device: H100-SXM, devices: 2}]\nbandwidth_Bps: [[0, .nan], [1, 0]]", "bandwidth_Bps"),
        ("nodes: [{device: H100-SXM, devices: 2}]\nlinks: {node: {bandwidth_Bps: 1.0, latency_s: .inf}}", "links.node.latency_s: "),
        ("[" * 5000, "is not YAML that can be read: RecursionError"),
        ("- 1", "must be a mapping with 'nodes', not list"),
        ("nodes: [", "is not YAML (line "),
        ("", "must be a mapping with 'nodes'"),
    ],
)
def test_wrong_files_are_told_where(tmp_path: Path, text: str, words: str) -> None:
    """A YAML file that is no cluster is refused in one sentence that names the key."""
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        parse_cluster(str(path))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A cluster file that does not exist is named."""
    path = tmp_path / "none.yaml"
    with pytest.raises(InputError, match="does not exist") as caught:
        parse_cluster(str(path))
    assert str(path) in str(caught.value)
