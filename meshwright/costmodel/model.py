"""CostModel: seconds of any op or collective on one device, with a range, from a compiled profile or from the datasheet.

A compiled model is one zip file: `model.json` (constants, spreads, provenance, the error report) and the residual forests as
lightgbm text. Opening it reads the constants alone; a forest is read when a class is first asked for. There is no pickle in it.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from meshwright.costmodel import residual
from meshwright.costmodel.calls import group_keys, peak_of, ready
from meshwright.costmodel.fit import Fitted, Group, Spread, forest_key, roofline, with_group
from meshwright.costmodel.moefit import MoeFitted
from meshwright.costmodel.moefit import price as price_moe
from meshwright.costmodel.opclasses import OP_CLASSES, OpClass, item_bytes
from meshwright.costmodel.segments import Segments, shifted
from meshwright.profiling.cluster import Device, load_device
from meshwright.profiling.errors import InputError
from meshwright.profiling.files import write_atomically

FORMAT = "meshwright.costs/1"
SHIPPED = Path(__file__).parent / "shipped"
# What stands in where nothing was measured: kernels reach about 70 % of a datasheet's peak and 75 % of its bandwidth, and are
# within a factor of two of that. See docs/accuracy.md.
UNMEASURED = np.array([5.0, 0.70, 0.75, 1.0, 30.0])
WIDE = Spread([], [float(np.log(0.5))], [float(np.log(2.0))], (float(np.log(0.4)), float(np.log(2.5))))


class Estimate(NamedTuple):
    """Seconds at the 5th, 50th and 95th percentile, and where they come from ("fitted" or "datasheet"). All [n]."""

    p05: np.ndarray
    p50: np.ndarray
    p95: np.ndarray
    basis: np.ndarray


@dataclass
class CostModel:
    """See the module. `classes` are fitted op classes, `links` the collectives by "op|ranks|nodes|kernel"."""

    device: str
    facts: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    classes: dict[str, Fitted] = field(default_factory=dict)
    moe: MoeFitted | None = None
    links: dict[str, Segments] = field(default_factory=dict)
    link_spread: dict[str, Spread] = field(default_factory=dict)
    link_shift: dict[str, list[float]] = field(default_factory=dict)  # of one-byte elements, see segments.byte_shift
    report: list[dict[str, Any]] = field(default_factory=list)
    _forests: dict[tuple[str, str, bool], Any] = field(default_factory=dict, repr=False)
    _archive: bytes | None = field(default=None, repr=False)

    # --- opening and saving ---

    @classmethod
    def load(cls, name: str | Path) -> CostModel:
        """A compiled model from its file, or the shipped one of a built-in device. InputError if there is none."""
        path = Path(name)
        if path.suffix == ".costs" or path.is_file():
            return cls._read(path)
        shipped_path = shipped(str(name))
        if shipped_path is None:
            raise InputError(f"{name} is neither a .costs file nor a device with a shipped cost model: {', '.join(shipped_names())}")
        return cls._read(shipped_path)

    @classmethod
    def find(cls, name: str) -> CostModel:
        """A compiled model by file or device; for a built-in device that has none, what its datasheet says."""
        if Path(name).suffix == ".costs" or Path(name).is_file() or shipped(name):
            return cls.load(name)
        return from_datasheet(load_device(name))

    @classmethod
    def _read(cls, path: Path) -> CostModel:
        if not path.is_file():
            raise InputError(f"cost model {path} {'is a folder' if path.is_dir() else 'does not exist'}")
        data = path.read_bytes()
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as z:
                head = json.loads(z.read("model.json"))
        except (zipfile.BadZipFile, KeyError, ValueError):
            raise InputError(
                f"{path} is not a compiled cost model: make one with 'meshwright costs compile profile.yaml -o {path.stem}.costs'"
            ) from None
        if head.get("format") != FORMAT:
            raise InputError(f"{path} is {head.get('format')!r}, this version reads {FORMAT!r}: compile its profile again")
        made = cls(head["device"], head["facts"], head["provenance"], report=head["report"], _archive=data)
        for kind, c in head["classes"].items():
            groups = {
                k: Group(np.array(g["theta"]), g["peak"], g["bandwidth"], g["index"], g["largest"], g["samples"], _spread(g["spread"]), g["trust"])
                for k, g in c["groups"].items()
            }
            made.classes[kind] = Fitted(kind, groups, dict.fromkeys(c["forests"]), dict.fromkeys(c["coarse"]))
        if head.get("moe"):
            m = head["moe"]
            spreads = {k: _spread(v) for k, v in m["spread"].items()}
            made.moe = MoeFitted(m["theta"], m["clip"], None, {k: v for k, v in spreads.items() if v}, m["largest"], m["kernels"])
        made.links = {k: Segments(**v) for k, v in head["links"].items()}
        made.link_spread = {k: Spread(v["edges"], v["low"], v["high"], tuple(v["beyond"])) for k, v in head["link_spread"].items()}
        made.link_shift = head.get("link_shift", {})
        return made

    def save(self, path: Path) -> None:
        """Writes the model whole or not at all."""
        write_atomically(path, self.to_bytes())

    @property
    def origin(self) -> str:
        """One line: measured on what, when, by what; or imported from where."""
        p = self.provenance
        if "measured_by" not in p:
            return f"{p.get('kind', 'fitted')}: {p.get('source', 'no source given')}"
        runs = p.get("runs") or [{}]
        return f"measured: {p.get('device_name', 'this device')}, {str(runs[-1].get('date', ''))[:10]}, by {p['measured_by']}"

    @property
    def stamp(self) -> str:
        """Twelve hex digits that change with anything in the model."""
        return hashlib.sha256(self._archive or self.to_bytes()).hexdigest()[:12]

    def to_bytes(self) -> bytes:
        head: dict[str, Any] = {
            "format": FORMAT, "device": self.device, "facts": self.facts, "provenance": self.provenance, "report": _rounded(self.report),
            "links": {k: _rounded(asdict(v)) for k, v in self.links.items()},
            "link_spread": {k: _rounded(asdict(v)) for k, v in self.link_spread.items()},
            "link_shift": _rounded(self.link_shift), "classes": {},
        }  # fmt: skip
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as z:
            for kind, c in self.classes.items():
                groups = {k: _rounded({**asdict(g), "theta": [float(x) for x in g.theta]}) for k, g in c.groups.items()}
                head["classes"][kind] = {"groups": groups, "forests": sorted(c.forests), "coarse": sorted(c.coarse)}
                for folder, forests in (("forest", c.forests), ("coarse", c.coarse)):
                    for key, text in forests.items():
                        z.writestr(_entry(f"{folder}/{kind}/{key}.txt"), text)
            if self.moe:
                m = self.moe
                spreads = {k: _rounded(asdict(v)) for k, v in m.spread.items()}
                head["moe"] = {"theta": m.theta, "clip": m.clip, "spread": spreads, "largest": m.largest, "kernels": m.kernels}
                if m.forest:
                    z.writestr(_entry("forest/moe/all.txt"), m.forest)
            z.writestr(_entry("model.json"), json.dumps(head, separators=(",", ":")), compress_type=zipfile.ZIP_DEFLATED)
        return buffer.getvalue()

    def forest(self, kind: str, key: str, fast: bool) -> Any | None:
        """The residual forest of a class, read on first use; None where it has none."""
        known = self.classes[kind].coarse if fast else self.classes[kind].forests
        if key not in known:
            return None
        return self._read_forest((kind, key, fast), known[key])

    def _read_forest(self, at: tuple[str, str, bool], text: str | None) -> Any | None:
        kind, key, fast = at
        if at not in self._forests:
            if text is None and self._archive is not None:
                with zipfile.ZipFile(io.BytesIO(self._archive)) as z:
                    name = f"{'coarse' if fast else 'forest'}/{kind}/{key}.txt"
                    text = z.read(name).decode() if name in z.namelist() else None
            self._forests[at] = residual.from_text(text) if text else None
        return self._forests[at]

    # --- ops ---

    def seconds(self, kind: str, fast: bool = False, **columns: Any) -> np.ndarray:
        """Median seconds of calls of a class; columns as in hardware.CLASSES, arrays or single values. [n]

        `fast` prices with a small forest: about a million calls a second on one core, at a somewhat larger error (the report
        of the model says how much).
        """
        return self._price(kind, fast, columns)[0]

    def estimate(self, kind: str, **columns: Any) -> Estimate:
        """Seconds with the range that nine of ten unseen samples fell into, and what they rest on."""
        p50, low, high, basis = self._price(kind, False, columns, ranges=True)
        return Estimate(p50 * np.exp(low), p50, p50 * np.exp(high), basis)

    def group(self, kind: str, **names: str) -> Group:
        """The constants that calls with these names (dtype, op, backend) are priced by. InputError if there are none."""
        fitted = self.classes.get(kind)
        found = _nearest(OP_CLASSES[kind], fitted, names) if fitted else None
        if fitted is None or found is None:
            raise InputError(f"the cost model of {self.device} has no samples of {kind} {' '.join(names.values())}")
        return fitted.groups[found]

    def basis(self, kind: str, **names: str) -> str:
        """ "fitted" if calls with these names (dtype, op, backend) were measured, else "datasheet"."""
        fitted = self.classes.get(kind)
        return "datasheet" if fitted is None or _nearest(OP_CLASSES[kind], fitted, names) is None else "fitted"

    def _price(self, kind: str, fast: bool, columns: Mapping[str, Any], ranges: bool = False) -> tuple[np.ndarray, ...]:
        if kind == "moe":
            return self._moe(columns)
        if kind not in OP_CLASSES:
            raise InputError(f"{kind!r} is not a class of op: the classes are {', '.join((*OP_CLASSES, 'moe', 'collective'))}")
        spec = OP_CLASSES[kind]
        c, n = ready(spec, columns)
        keys = group_keys(spec, c, n)
        if isinstance(keys, str):
            return self._group(spec, keys, c, n, fast, ranges)
        out = [np.empty(n), np.empty(n), np.empty(n), np.empty(n, object)]
        for key in np.unique(keys):
            mask = keys == key
            part = {k: v if isinstance(v, str) else v[mask] for k, v in c.items()}
            for whole, piece in zip(out, self._group(spec, str(key), part, int(mask.sum()), fast, ranges)):
                whole[mask] = piece
        return tuple(out)

    def _group(self, spec: OpClass, key: str, c: dict[str, Any], n: int, fast: bool, ranges: bool) -> tuple[np.ndarray, ...]:
        work = spec.work(c)
        fitted = self.classes.get(spec.name)
        names = dict(zip(spec.groups, key.split("|")))
        found = _nearest(spec, fitted, names) if fitted else None
        if fitted is None or found is None:
            peak, bandwidth = peak_of(self.facts, names.get("dtype", "bf16")), float(self.facts.get("memory_bandwidth_Bps", 1e12))
            seconds = roofline(UNMEASURED, work, peak, bandwidth)
            low, high = WIDE.at(seconds, np.zeros(n, bool)) if ranges else (seconds, seconds)
            return seconds, low, high, np.full(n, "datasheet", object)
        g = fitted.groups[found]
        seconds = roofline(g.theta, work, g.peak, g.bandwidth)
        forest = self.forest(spec.name, forest_key(spec, found), fast)
        if forest is not None:
            x = residual.encode(spec.features(c, work, int(self.facts.get("sms", 100))))
            left = residual.predict(forest, with_group(x, np.full(n, float(g.index))))
            if g.trust < 1:
                left = np.where(spec.size(work) > g.largest, left * g.trust, left)
            seconds = seconds * np.exp(left)
        if not ranges:
            return seconds, seconds, seconds, seconds
        low, high = (g.spread or WIDE).at(seconds, spec.size(work) > g.largest)
        return seconds, low, high, np.full(n, "fitted", object)

    def _moe(self, columns: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
        """Fused mixture-of-experts layers. Without samples: three products at the datasheet's rates."""
        if self.moe is None:
            spec = OP_CLASSES["grouped_gemm"]
            c = {k: columns.get(k, 1.0) for k in ("tokens", "topk", "experts", "hidden", "inter", "tp", "ep")}
            rows, groups = np.asarray(c["tokens"]) * c["topk"] / c["ep"], np.maximum(1, np.asarray(c["experts"]) / np.asarray(c["ep"]))
            inner = np.asarray(c["inter"]) / np.asarray(c["tp"])
            parts = {"dtype": columns.get("dtype", "bf16"), "groups": groups, "m": rows}
            up = self._price(spec.name, False, {**parts, "n": 2 * inner, "k": c["hidden"]}, ranges=True)
            down = self._price(spec.name, False, {**parts, "n": c["hidden"], "k": inner}, ranges=True)
            return up[0] + down[0], np.minimum(up[1], down[1]), np.maximum(up[2], down[2]), up[3]
        forest = self._read_forest(("moe", "all", False), self.moe.forest)
        seconds, low, high = price_moe(self.moe, forest, columns, self.facts)
        return seconds, low, high, np.full(len(seconds), "fitted", object)

    # --- collectives ---

    def collective_seconds(self, op: str, nbytes: np.ndarray, ranks: int, nodes: int = 1, kernel: str = "", dtype: str = "bf16") -> np.ndarray | None:
        """Median seconds of a measured collective over `ranks` on `nodes`; None where no such group was measured. `nbytes` of
        the full tensor. Between two measured numbers of ranks seconds are interpolated in the logarithm; beyond the largest,
        latency grows with the hops and the share of the tensor that moves as (n - 1) / n."""
        known = sorted({int(k.split("|")[1]) for k in self.links if k.split("|")[0] == op and k.split("|")[2:] == [str(nodes), kernel]})
        if not known or ranks < 2:
            return None
        size = np.asarray(nbytes, float)
        shift = self.link_shift.get(f"{op}|{kernel}" if kernel else op)
        factor = shifted(size, shift) if shift and item_bytes(dtype) == 1 else 1.0

        def at(n: int) -> np.ndarray:
            return np.asarray(self.links[f"{op}|{n}|{nodes}|{kernel}"].seconds(size) * factor)

        if ranks in known:
            return at(ranks)
        under, over = [n for n in known if n < ranks], [n for n in known if n > ranks]
        if under and over:
            a, b = under[-1], over[0]
            share = (np.log2(ranks) - np.log2(a)) / (np.log2(b) - np.log2(a))
            return np.asarray(np.exp((1 - share) * np.log(at(a)) + share * np.log(at(b))))
        if not under:
            return at(over[0])
        n = under[-1]
        last = self.links[f"{op}|{n}|{nodes}|{kernel}"]
        start = last.seconds(np.zeros(1))[0]
        return np.asarray(start * (ranks - 1) / max(n - 1, 1) + np.maximum(at(n) - start, 0) * ((ranks - 1) / ranks) / ((n - 1) / n))


def _nearest(spec: OpClass, fitted: Fitted, names: Mapping[str, str]) -> str | None:
    """The group of these names; with another backend, or another dtype of the same width, where there is no such group."""
    exact = "|".join(names.get(c, "") for c in spec.groups)
    if exact in fitted.groups:
        return exact
    best, score = None, -1.0
    for key, g in fitted.groups.items():
        have = dict(zip(spec.groups, key.split("|")))
        if "op" in have and have["op"] != names.get("op", have["op"]):
            continue
        if "mode" in have and have["mode"] != names.get("mode", have["mode"]):
            continue
        dtype, kv = names.get("dtype", ""), names.get("kv_dtype", "")
        same = not dtype or have.get("dtype", dtype) == dtype
        if not same and {dtype, have.get("dtype", "")} != {"bf16", "fp16"}:
            continue
        if kv and item_bytes(have.get("kv_dtype", kv)) != item_bytes(kv):
            continue
        order = {"torch": 3, "vllm": 2, "trtllm": 1}.get(have.get("backend", ""), 0)
        likeness = 10 * (have.get("backend", "") == names.get("backend", "")) + 5 * same + order + min(g.samples, 1e6) / 1e7
        if "nodes" in have:
            likeness -= abs(np.log2(float(have["nodes"]) / float(names.get("nodes", 1))))
        if likeness > score:
            best, score = key, likeness
    return best


def _spread(data: dict[str, Any] | None) -> Spread | None:
    return Spread(data["edges"], data["low"], data["high"], tuple(data["beyond"])) if data else None


def _entry(name: str) -> zipfile.ZipInfo:
    """An entry with a fixed date, so that equal models are equal files."""
    info = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))
    info.compress_type = zipfile.ZIP_LZMA
    return info


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def shipped_names() -> list[str]:
    """Devices that a compiled model comes with."""
    return sorted(p.stem for p in SHIPPED.glob("*.costs"))


def shipped(name: str) -> Path | None:
    """The shipped model of a built-in device by name or alias; None where it has none."""
    for spelling in (name, name.replace("_", "-")):
        try:
            path = SHIPPED / f"{load_device(spelling).name}.costs"
        except InputError:
            continue
        if path.exists():
            return path
    return None


@lru_cache(maxsize=16)
def for_device(name: str) -> CostModel | None:
    """The shipped model of a device, opened once; None where it has none."""
    path = shipped(name)
    return CostModel.load(path) if path else None


def from_datasheet(device: Device) -> CostModel:
    """A model of a device that nothing was measured on."""
    facts = {"peak_flops": dict(device.peak_flops), "memory_bandwidth_Bps": device.memory_bandwidth_Bps}
    return CostModel(device.name, facts, {"source": device.source, "kind": "datasheet"})
