"""From what a user names (a config.json, a factory) to a module on the meta device, its inputs and its objective."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meshwright.profiling.errors import InputError
from meshwright.profiling.ops import grouped_experts

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Loaded:
    """A model ready to trace: `module` and the tensors of `inputs` are on meta; `high` bounds integer inputs."""

    name: str
    source: str
    origin: str  # "hf" or "module"
    module: nn.Module
    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]
    labels: Tensor | None
    objective: str  # cross_entropy, mse, square or custom
    labels_from: str  # sample, shift, random or none
    loss: Callable[[Any, Any], Tensor]
    high: dict[str, int] = field(default_factory=dict)
    sample_source: str = ""
    notes: list[str] = field(default_factory=list)


def load(source: str, *, batch: int, seq: int, precision: str, sample: str | None = None) -> Loaded:
    """Loads `source` on meta with inputs for `batch` samples of length `seq`.

    `source` is a transformers config.json or its folder, `path/to/file.py:factory` or `package.module:factory`. Raises
    InputError, one sentence, for anything that is not.
    """
    if seq < 1:
        raise InputError(f"the sequence length must be at least 1, not {seq}")
    if precision not in DTYPES:
        raise InputError(f"unknown precision {precision!r}: it is one of {', '.join(DTYPES)}")
    path = Path(source)
    if path.is_dir() or (path.suffix == ".json"):
        if sample:
            raise InputError("--sample belongs to a module factory; a config.json says its own inputs")
        return _load_hf(path, batch=batch, seq=seq, precision=precision)
    if ":" not in source:
        what = "does not exist" if not path.exists() else "is neither a config.json nor a folder with one"
        raise InputError(f"{source} {what}: name a config.json, its folder, path/to/file.py:factory or package.module:factory")
    return _load_factory(source, batch=batch, seq=seq, precision=precision, sample=sample)


# --- transformers ----------------------------------------------------------------------------------------------------


def read_config(path: Path) -> dict[str, Any]:
    """The dictionary of a config.json (or of the one in a folder), or InputError."""
    if path.is_dir():
        if not (path / "config.json").exists():
            raise InputError(f"the folder {path} has no config.json")
        path = path / "config.json"
    if not path.exists():
        raise InputError(f"{path} does not exist")
    try:
        data = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise InputError(f"{path} is not JSON: {e}") from None
    if not isinstance(data, dict) or "model_type" not in data:
        raise InputError(f"{path} is not a model's config: it has no 'model_type'")
    return data


def hf_config(data: dict[str, Any], where: str) -> Any:
    """A transformers config object from its dictionary, or InputError."""
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        raise InputError("a config.json needs transformers: pip install 'meshwright[hf]'") from None
    if data["model_type"] not in CONFIG_MAPPING:
        raise InputError(f"{where}: transformers knows no model_type {data['model_type']!r}")
    try:
        config = CONFIG_MAPPING[data["model_type"]].from_dict(data)
    except Exception as e:
        raise InputError(f"{where} is not a valid {data['model_type']} config: {one_line(e)}") from None
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return config


def hf_class(config: Any, where: str) -> type[nn.Module]:
    """The model class that a config names in `architectures`, or the first head that transformers has for its type."""
    import transformers

    for name in config.architectures or ():
        cls = getattr(transformers, name, None)
        if cls is None:
            raise InputError(f"{where}: transformers has no architecture {name!r}")
        return cls  # type: ignore[no-any-return]
    for auto in (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForSeq2SeqLM,
        transformers.AutoModelForMaskedLM,
        transformers.AutoModelForImageClassification,
    ):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]  # type: ignore[return-value]
    raise InputError(f"{where}: no model with a loss for model_type {config.model_type!r}; set 'architectures'")


def build_hf(path: Path, precision: str) -> tuple[nn.Module, Any]:
    """The model of a config.json on meta, its parameters in `precision`, and its config."""
    config = hf_config(read_config(path), str(path))
    cls = hf_class(config, str(path))
    try:
        with torch.device("meta"):
            module = cls(config)
    except Exception as e:
        raise InputError(f"{path}: {cls.__name__} cannot be built from this config: {one_line(e)}") from None
    for p in module.parameters():
        p.data = p.data.to(DTYPES[precision])
    return module.train(), config


def _load_hf(path: Path, *, batch: int, seq: int, precision: str) -> Loaded:
    module, config = build_hf(path, precision)
    name = path.name if path.is_dir() else path.stem if path.stem != "config" else path.resolve().parent.name
    return loaded_hf(module, config, name, str(path), batch=batch, seq=seq, precision=precision)


def loaded_hf(module: nn.Module, config: Any, name: str, source: str, *, batch: int, seq: int, precision: str) -> Loaded:
    """A model of transformers on meta with the inputs and the objective that its class has. InputError where it has none here."""
    _check_positions(module, seq, source)
    cls = type(module).__name__
    long: dict[str, Any] = {"dtype": torch.long, "device": "meta"}
    vocab = getattr(config.get_text_config(), "vocab_size", 2)
    kwargs: dict[str, Tensor] = {"input_ids": torch.zeros(batch, seq, **long)}
    high = {"input_ids": vocab, "labels": vocab}
    labels = torch.zeros(batch, seq, **long)
    labels_from = "random"
    if getattr(module, "main_input_name", "input_ids") == "pixel_values":
        size = config.image_size if isinstance(config.image_size, list | tuple) else (config.image_size,) * 2
        kwargs = {"pixel_values": torch.zeros(batch, config.num_channels, *size, dtype=DTYPES[precision], device="meta")}
        high = {"labels": config.num_labels}
        labels = torch.zeros(batch, **long)
    elif getattr(config, "is_encoder_decoder", False):
        kwargs["decoder_input_ids"] = torch.zeros(batch, seq, **long)
        high["decoder_input_ids"] = vocab
    elif cls.endswith(("ForCausalLM", "LMHeadModel")):
        labels_from = "shift"
    elif not cls.endswith("ForMaskedLM"):
        heads = "causal, masked, sequence-to-sequence or image-classification"
        raise InputError(f"{source}: {cls} has no training objective here; use a {heads} head")
    loaded = Loaded(
        name=name, source=source, origin="hf", module=module, args=(), kwargs=kwargs, labels=labels,
        objective="cross_entropy", labels_from=labels_from, loss=cross_entropy, high=high,
    )  # fmt: skip
    windows = {w for m in module.modules() if isinstance(w := getattr(m, "sliding_window", None), int)}
    if windows and min(windows) < seq:
        loaded.notes.append(f"attention over a sliding window of {min(windows)} is priced as full attention")
    return loaded


def _check_positions(module: nn.Module, seq: int, where: str) -> None:
    """A learned position table bounds the sequence; on meta nothing would notice."""
    for name, m in module.named_modules():
        learned = isinstance(m, nn.Embedding) and re.search(r"(^|\.)(wpe|position_embeddings|embed_positions)$", name)
        if learned and isinstance(m, nn.Embedding) and m.num_embeddings < seq:
            raise InputError(f"{where}: a sequence of {seq} is longer than its {m.num_embeddings} learned positions")


# --- factories -------------------------------------------------------------------------------------------------------


def import_target(target: str) -> tuple[ModuleType, Any]:
    """`file.py:name` or `package.module:name` -> (module, object), or InputError."""
    where, _, name = target.rpartition(":")
    if not where or not name:
        raise InputError(f"{target!r} must be path/to/file.py:name or package.module:name")
    if where.endswith(".py"):
        path = Path(where).resolve()
        if not path.exists():
            raise InputError(f"{where} does not exist")
        key = "meshwright_user_" + re.sub(r"\W", "_", str(path))
        if key in sys.modules:
            module = sys.modules[key]
        else:
            spec = importlib.util.spec_from_file_location(key, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[key] = module
            sys.path.insert(0, str(path.parent))
            try:
                spec.loader.exec_module(module)
            except (Exception, SystemExit) as e:
                del sys.modules[key]
                raise InputError(f"{where} cannot be imported: {one_line(e)}") from None
            finally:
                sys.path.remove(str(path.parent))
    else:
        try:
            module = importlib.import_module(where)
        except (Exception, SystemExit) as e:
            raise InputError(f"{where} cannot be imported: {one_line(e)}") from None
    if not hasattr(module, name):
        raise InputError(f"{where} has no {name!r}")
    return module, getattr(module, name)


def build_factory(source: str, *, device: str = "meta") -> tuple[nn.Module, ModuleType, list[str]]:
    """Calls a factory under `device`; a factory that cannot run on meta runs on the CPU and is moved. InputError if it raises."""
    module, factory = import_target(source)
    if not callable(factory):
        raise InputError(f"{source} is not callable: it must be a function that returns an nn.Module")
    notes: list[str] = []
    try:
        with torch.device(device):
            built = factory()
    except (Exception, SystemExit) as first:
        try:
            built = factory()
        except (Exception, SystemExit):
            raise InputError(f"{source} raised {one_line(first)}") from None
        notes.append("the factory does not run on meta tensors; it was built in host memory")
        if isinstance(built, nn.Module):
            built = built.to(device)
    if not isinstance(built, nn.Module):
        raise InputError(f"{source} returned {type(built).__name__}, not an nn.Module")
    if device == "meta":
        built = built.to("meta")
    return built, module, notes


def call_sample(fn: Callable[..., Any], where: str, batch: int, seq: int) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Calls sample(batch, seq) (or sample(batch)) -> (positional inputs, keyword inputs, labels or None)."""
    try:
        wants = len([p for p in inspect.signature(fn).parameters.values() if p.default is p.empty])
        made = fn(batch, seq) if wants >= 2 else fn(batch)
    except (Exception, SystemExit) as e:
        raise InputError(f"{where} raised {one_line(e)}; it is called as sample(batch, seq)") from None
    if isinstance(made, Tensor):
        return (made,), {}, None
    if isinstance(made, Mapping):
        values = dict(made)
        labels = values.pop("labels", None)
        return (), values, labels
    if isinstance(made, tuple | list):
        return tuple(made), {}, None
    raise InputError(f"{where} returned {type(made).__name__}: it must return a tensor, a tuple of tensors or a dict of them")


def _load_factory(source: str, *, batch: int, seq: int, precision: str, sample: str | None) -> Loaded:
    built, home, notes = build_factory(source)
    if sample:
        _, fn = import_target(sample)
    elif hasattr(home, "sample"):
        fn, sample = home.sample, f"{source.rpartition(':')[0]}:sample"
    else:
        raise InputError(f"{source} has no sample(batch, seq) beside it that makes its inputs: add one, or name it with --sample")
    with torch.device("meta"):
        made = call_sample(fn, sample, batch, seq)
    name = source.rpartition(":")[0].removesuffix(".py").rpartition("/")[2].rpartition(".")[2]
    return loaded_module(built, home, name, source, sample, made, batch=batch, precision=precision, notes=notes)


def loaded_module(
    built: nn.Module, home: Any, name: str, source: str, sample: str, made: tuple[tuple[Any, ...], dict[str, Any], Any], *, batch: int,
    precision: str, notes: list[str],
) -> Loaded:  # fmt: skip
    """A plain module on meta with what call_sample returned for `batch` samples, and `home.loss` or the objective that labels suggest."""
    for p in built.parameters():
        if p.is_floating_point():
            p.data = p.data.to(DTYPES[precision])
    built.train()
    args, kwargs, labels = made
    tensors = {f"{i}": a for i, a in enumerate(args)} | kwargs
    for key, value in tensors.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{sample}: input {key!r} is {type(value).__name__}, not a tensor")
        if not any(size % batch == 0 for size in value.shape):
            raise InputError(f"{sample}: input {key!r} of shape {tuple(value.shape)} has no dimension of the batch it was asked for")

    def cast(t: Tensor) -> Tensor:
        return t.to("meta", DTYPES[precision]) if t.is_floating_point() else t.to("meta")

    args, kwargs = tuple(cast(a) for a in args), {k: cast(v) for k, v in kwargs.items()}
    loaded = Loaded(
        name=name, source=source, origin="module", module=built, args=args, kwargs=kwargs, labels=None,
        objective="square", labels_from="none", loss=square, sample_source=sample, notes=notes,
    )  # fmt: skip
    _choose_objective(loaded, home, labels)
    return loaded


def _choose_objective(loaded: Loaded, home: Any, labels: Any) -> None:
    """The file's own loss(output, labels), or one that the labels and the output's shape suggest."""
    try:
        with torch.no_grad(), grouped_experts(loaded.module):
            output = loaded.module(*loaded.args, **loaded.kwargs)
    except (Exception, SystemExit) as e:
        raise InputError(f"{loaded.source}: the model does not run on its sample: {one_line(e)}") from None
    if labels is not None:
        loaded.labels, loaded.labels_from = labels.to("meta"), "sample"
    if hasattr(home, "loss"):
        loaded.loss, loaded.objective = home.loss, "custom"
        return
    out = main_output(output)
    if out is None:
        raise InputError(f"{loaded.source} returns {type(output).__name__}: add loss(output, labels) beside it")
    inputs = [*loaded.args, *loaded.kwargs.values()]
    if labels is not None:
        loaded.objective, loaded.loss = ("mse", mse) if labels.is_floating_point() else ("cross_entropy", cross_entropy)
    elif len(inputs) == 1 and inputs[0].dtype == torch.long and inputs[0].ndim == 2 and out.shape[:-1] == inputs[0].shape:
        loaded.labels, loaded.labels_from = torch.zeros_like(inputs[0]), "shift"
        loaded.objective, loaded.loss = "cross_entropy", cross_entropy
    else:
        loaded.notes.append("no labels and no loss(output, labels): the objective is the mean square of the output")


# --- objectives: what is traced, and what an emitted script computes ---------------------------------------------------


def main_output(output: Any) -> Tensor | None:
    """The tensor that the loss reads: the output itself, its .logits, or the first tensor of a tuple or dict."""
    if isinstance(output, Tensor):
        return output
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits  # type: ignore[no-any-return]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((v for v in values if isinstance(v, Tensor)), None)


def cross_entropy(output: Any, labels: Tensor) -> Tensor:
    """Mean cross-entropy in fp32 over every position. output [..., classes], labels [...]."""
    logits = main_output(output)
    assert logits is not None
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten())


def mse(output: Any, labels: Tensor) -> Tensor:
    """Mean squared error in fp32."""
    out = main_output(output)
    assert out is not None
    return F.mse_loss(out.float(), labels.float())


def square(output: Any, labels: None) -> Tensor:
    """Mean square of the output: the stand-in objective of a model that has neither labels nor a loss."""
    out = main_output(output)
    assert out is not None
    return out.float().square().mean()


def one_line(e: BaseException) -> str:
    """An exception in one line: its class and the first line of its text."""
    lines = "".join(c if c.isprintable() or c.isspace() else "?" for c in str(e)).strip().splitlines()
    return f"{type(e).__name__}: {lines[0].rstrip('.')}" if lines else type(e).__name__
