"""A Flow as tensors and JSON, and back: nothing is unpickled, a family's name and options build the layers anew."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from boltzsample.flows.base import BASES
from boltzsample.flows.families import make_flow
from boltzsample.flows.flow import Flow
from boltzsample.maps import Dense, Diagonal
from boltzsample.streams import Stream


def config(flow: Flow) -> dict[str, Any]:
    """How to build the flow again, in JSON's terms. Raises ValueError for a base that is not the library's."""
    base = type(flow.base).__name__
    if type(flow.base) not in BASES.values():
        raise ValueError(f"the base of this flow is a {base}, which cannot be saved; wanted {' or '.join(BASES)}")
    white = None if flow.whitening is None else type(flow.whitening).__name__
    settings = {"class": base, **asdict(flow.base)}  # type: ignore[call-overload]
    options = {name: _listed(value) for name, value in flow.options.items()}
    return {"family": flow.family, "dim": flow.dim, "options": options, "base": settings, "whitening": white}


def rebuild(tensors: Mapping[str, Tensor], config: Mapping[str, Any], layers: nn.Module | None) -> Flow:
    """The flow of (tensors, config). Raises ValueError."""
    settings = dict(config["base"])
    name = settings.pop("class")
    if name not in BASES:
        raise ValueError(f"the saved flow has a base {name!r}; this version knows {', '.join(BASES)}")
    base = BASES[name](**settings)
    white = _whitening(tensors, config["whitening"])
    weights = {key.removeprefix("layers."): t for key, t in tensors.items() if key.startswith("layers.")}
    dtype = next((t.dtype for t in weights.values() if t.is_floating_point()), torch.float64)
    flow = _unfilled(config, base, layers, dtype)
    try:
        flow.layers.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the saved tensors do not fit the flow {config['family']!r}: {str(error).splitlines()[-1].strip()}") from None
    return flow.whitened(white)


def write(flow: Flow, path: Path) -> Path:
    """One safetensors file: the tensors, and the configuration as JSON in its header."""
    from safetensors.torch import save_file

    tensors, how = flow.state()
    save_file({name: t.cpu().contiguous().clone() for name, t in tensors.items()}, path, metadata={"flow": json.dumps(how)})
    return path


def read(path: Path, layers: nn.Module | None) -> Flow:
    """The Flow of a file that `write` made. Raises ValueError, FileNotFoundError."""
    return rebuild(*stored(path, "flow", "flow", "flow.save"), layers)


def stored(path: str | Path, key: str, what: str, writer: str) -> tuple[dict[str, Tensor], Any]:
    """Tensors of a safetensors file, and the JSON under `key` of its metadata. Raises ValueError, FileNotFoundError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            how = (file.metadata() or {}).get(key)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error}); wanted one that {writer} wrote") from None
    if how is None:
        raise ValueError(f"{path} holds tensors but no {what}; wanted a file that {writer} wrote")
    return tensors, json.loads(how)


def _unfilled(config: Mapping[str, Any], base: Any, layers: nn.Module | None, dtype: torch.dtype) -> Flow:
    if layers is not None:
        return Flow(base, copy.deepcopy(layers), None, config["family"], dict(config["options"]))
    if config["family"] is None:
        raise ValueError("this flow was not made by name, so its layers are code and were not saved; pass layers=, the module it had")
    options = {name: _tupled(value) for name, value in config["options"].items()}
    return make_flow(config["family"], int(config["dim"]), Stream(0).rng(dtype), base=base, **options)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _whitening(tensors: Mapping[str, Tensor], name: str | None) -> Diagonal | Dense | None:
    if name is None:
        return None
    if name not in ("Diagonal", "Dense"):
        raise ValueError(f"the saved flow has a whitening {name!r}; this version knows Diagonal and Dense")
    second = tensors["whitening.s" if name == "Diagonal" else "whitening.L"]
    return Diagonal(tensors["whitening.m"], second) if name == "Diagonal" else Dense(tensors["whitening.m"], second)
