"""draws.nc: one netCDF-4 file, written by h5netcdf, that ArviZ 0.2x and 1.x both read.

Groups: `posterior` (the user's space), `sample_stats` (lp, log_weight), `unconstrained` (the tensors of `Draws`, in the
sampler's space) and, in the user's space, `starts` (where the chains began) and `far` (points far out). Bits and dtypes come back
as they were.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from boltzsample.arviz_bridge import attributes, coordinate_names, posterior_arrays, safe_names, sample_stats
from boltzsample.functionals import Values

if TYPE_CHECKING:
    from boltzsample.draws import Draws
    from boltzsample.results import Result

WORD = np.dtype("O", metadata={"vlen": str})  # h5py's variable-length string
DIMS = {  # the tensors of Draws
    "x": ("chain", "draw", "dim"),
    "log_prob": ("chain", "draw"),
    "log_weight": ("chain", "draw"),
    "ancestor": ("chain", "draw"),
    "log_z": ("chain",),
    "starts": ("chain", "dim"),
    "group": ("chain",),
    "moves": ("chain",),
    "variance": ("chain",),
    "shift": ("chain", "functional"),
    "bad_x": ("point", "dim"),
    "far": ("end", "ray", "dim"),
    "fall": ("ray",),
}


def write(result: Result, path: Path) -> None:
    """Write the draws of one Result (not of its replicates)."""
    import h5netcdf

    names, axis = coordinate_names(result), ("coordinate",)
    labels = {} if names is None else {"coordinate": names}
    with h5netcdf.File(path, "w") as file:
        file.attrs.update(attributes(result))
        posterior = {k: (v, _dims(k, v, ("chain", "draw"), axis if labels else ())) for k, v in posterior_arrays(result).items()}
        _group(file, "posterior", posterior, labels)
        _group(file, "sample_stats", {k: (v, ("chain", "draw")) for k, v in sample_stats(result).items()}, {})
        _group(file, "unconstrained", {k: (v, DIMS[k]) for k, v in draws_arrays(result.draws).items()}, {})
        for name, kept, batch in (("starts", result.start_values, ("chain",)), ("far", result.far_values, ("end", "ray"))):
            arrays = {k: (v, _dims(k, v, batch, axis if labels else ())) for k, v in _arrays(kept).items()}
            _group(file, name, arrays, labels if arrays else {})


def read(path: Path, keys: list[str] | None) -> tuple[dict[str, Tensor], Values, Values | None, Values | None]:
    """(tensors of Draws, values, starts, values far out) of a file; `keys` are the names of a dict of values, None for a single tensor."""
    import h5netcdf

    with h5netcdf.File(path, "r") as file:
        tensors = {k: _tensor(v) for k, v in file["unconstrained"].variables.items() if k in DIMS}
        values = _values(file["posterior"].variables, keys)
        return tensors, values, _kept(file, "starts", keys), _kept(file, "far", keys)


def draws_arrays(draws: Draws) -> dict[str, Any]:
    """The tensors of Draws that are there and hold something (netCDF has no axes of length zero)."""
    tensors = {name: getattr(draws, name) for name in DIMS}
    return {name: t.detach().cpu().numpy() for name, t in tensors.items() if t is not None and t.numel()}


def _arrays(values: Values | None) -> dict[str, Any]:
    if values is None:
        return {}
    values = values if isinstance(values, dict) else {"x": values}
    return {safe: values[name].detach().cpu().numpy() for name, safe in safe_names(values).items()}


def _kept(file: Any, group: str, keys: list[str] | None) -> Values | None:
    """The values of a group that may be empty or, in older files, not there."""
    variables = file[group].variables if group in file else {}
    return _values(variables, keys) if any(name not in ("chain", "coordinate") for name in variables) else None


def _dims(name: str, array: Any, batch: tuple[str, ...], axis: tuple[str, ...]) -> tuple[str, ...]:
    return (*batch, *(axis or (f"{name}_dim_{i}" for i in range(array.ndim - len(batch)))))


def _group(file: Any, name: str, arrays: dict[str, tuple[Any, tuple[str, ...]]], labels: dict[str, list[str]]) -> None:
    """A group of variables with their dimensions; `chain` and `draw` are numbered and axes in `labels` carry names."""
    group = file.create_group(name)
    group.dimensions = {dim: size for array, dims in arrays.values() for dim, size in zip(dims, array.shape, strict=True)}
    for dim in ("chain", "draw"):
        if dim in group.dimensions:
            group.create_variable(dim, (dim,), data=np.arange(group.dimensions[dim].size))
    for dim, words in labels.items():
        group.create_variable(dim, (dim,), dtype=WORD, data=np.array(words, dtype=object))
    for key, (array, dims) in arrays.items():
        group.create_variable(key, dims, data=array)


def _values(variables: Any, keys: list[str] | None) -> Values:
    if keys is None:
        return _tensor(variables["x"])
    return {key: _tensor(variables[safe]) for key, safe in safe_names(keys).items()}


def _tensor(variable: Any) -> Tensor:
    return torch.from_numpy(np.array(variable[...]))
