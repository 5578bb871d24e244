"""What an object is made of: its tensors by dotted path, and everything else as JSON-ready words. Read only, never executed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """(dotted path, tensor) of every tensor in a dataclass, module, dict, list or tuple.

    >>> import torch
    >>> dict(tensors({"kernel": [torch.tensor(1.0), 2.0]}))
    {'kernel.0': tensor(1.)}
    """
    if isinstance(value, Tensor):
        yield path or "tensor", value.detach()
    elif isinstance(value, nn.Module):
        yield from ((_join(path, name), t.detach()) for name, t in value.state_dict().items() if isinstance(t, Tensor))
    else:
        for name, part in _parts(value):
            yield from tensors(part, _join(path, name))


def describe(value: Any) -> Any:
    """`value` in JSON's terms: numbers, words, lists and dicts; tensors as words, because they are stored elsewhere.

    >>> describe({"n": 3, "h": (0.5, float("inf")), "f": len})
    {'n': 3, 'h': [0.5, 'inf'], 'f': 'len'}
    """
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return str(value)  # an enum's word
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)} {value.dtype}"
    if is_dataclass(value) and not isinstance(value, type):
        return {"class": type(value).__name__, **{name: describe(part) for name, part in _parts(value)}}
    if isinstance(value, Mapping):
        return {str(key): describe(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [describe(part) for part in value]
    return getattr(value, "__qualname__", None) or (type(value).__name__ if isinstance(value, nn.Module) else repr(value)[:200])


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if is_dataclass(value) and not isinstance(value, type):
        yield from ((f.name, getattr(value, f.name)) for f in fields(value))
    elif isinstance(value, Mapping):
        yield from ((str(key), part) for key, part in value.items())
    elif isinstance(value, list | tuple):
        yield from ((str(i), part) for i, part in enumerate(value))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
