"""Draws as ArviZ has them: InferenceData (0.2x) or DataTree (1.x). No torch is imported here, and ArviZ only when asked.

The two lines differ in more than the type: `from_dict` takes groups as keywords or as one nested dict (0.2x silently
swallows the nested form as a single group), and attributes per root or per group. `hasattr(az, "InferenceData")` is True on
both, so the version number decides.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from boltzsample.results import Result

Groups = Mapping[str, Mapping[str, Any]]
RESERVED = ("chain", "draw", "coordinate")


def result_to_arviz(result: Result) -> Any:
    """Groups `posterior` (the user's space; one variable a key, or `x`) and `sample_stats` (lp, log_weight); attributes
    `status`, `method` and what ArviZ itself asks for."""
    if result.draws.log_weight is not None:
        warnings.warn(
            "these draws carry weights (sample_stats.log_weight), which ArviZ's own summaries and plots ignore; "
            "take means and error bars from result.expectation, or resample by the weights first",
            UserWarning,
            stacklevel=3,
        )
    groups = {"posterior": posterior_arrays(result), "sample_stats": sample_stats(result)}
    names = coordinate_names(result)
    if names is None:
        return to_arviz(groups, attrs=attributes(result))
    return to_arviz(groups, coords={"coordinate": names}, dims={"x": ["coordinate"]}, attrs=attributes(result))


def to_arviz(groups: Groups, *, coords: Any = None, dims: Any = None, attrs: Mapping[str, Any] | None = None) -> Any:
    """groups: {"posterior": {name: (chain, draw, *shape)}, "sample_stats": {...}, ...} as the installed ArviZ wants them."""
    az = import_arviz()
    filled = {name: dict(group) for name, group in groups.items() if group}
    with warnings.catch_warnings():  # hundreds of short chains are what we run, not a transposed array
        warnings.filterwarnings("ignore", message="More chains|Found chain dimension")
        if is_1x(az.__version__):
            return az.from_dict(filled, coords=coords, dims=dims, attrs={"/": dict(attrs or {})})
        return az.from_dict(**filled, coords=coords, dims=dims, attrs=dict(attrs or {}))


def import_arviz() -> Any:
    """The arviz module, without the notice about its future that 0.23 prints once a day."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz
    return arviz


def is_1x(version: str) -> bool:
    """Whether an ArviZ of this version returns DataTrees.

    >>> is_1x("0.23.4"), is_1x("1.3.0"), is_1x("1.0.0rc1")
    (False, True, True)
    """
    return int(version.split(".")[0]) >= 1


def posterior_arrays(result: Result) -> dict[str, Any]:
    """name -> (chain, draw, *shape), the draws in the user's space, under names that netCDF can hold."""
    values = result.values if isinstance(result.values, dict) else {"x": result.values}
    return {safe: values[name].detach().cpu().numpy() for name, safe in safe_names(values).items()}


def coordinate_names(result: Result) -> list[str] | None:
    """The labels along the one axis of `x`; None where the values are a dict or have another shape."""
    one_axis = not isinstance(result.values, dict) and result.values.ndim == 3
    return list(result.labels) if one_axis else None


def sample_stats(result: Result) -> dict[str, Any]:
    """lp (chain, draw), and log_weight where the draws are weighted."""
    draws = result.draws
    stats = {"lp": draws.log_prob} | ({} if draws.log_weight is None else {"log_weight": draws.log_weight})
    return {name: value.detach().cpu().numpy() for name, value in stats.items()}


def attributes(result: Result) -> dict[str, Any]:
    """What every file and tree says about where it comes from."""
    return {
        "inference_library": "boltzsample",
        "method": str(result.config.get("method", "draws made elsewhere")),
        "status": str(result.status),
        "flags": ", ".join(dict.fromkeys(f.code for f in result.flags)),
        "sampling_time": float(result.seconds),
    }


def safe_names(names: Iterable[str]) -> dict[str, str]:
    """Each name with one that can be a variable beside the dimensions: no slash (a group to HDF5), no clash with them.

    >>> safe_names(["w", "layer/w", "chain"])
    {'w': 'w', 'layer/w': 'layer.w', 'chain': 'chain_'}
    """
    safe: dict[str, str] = {}
    for name in names:
        candidate = name.replace("/", ".") or "_"
        while candidate in safe.values() or candidate in RESERVED:
            candidate += "_"
        safe[name] = candidate
    return safe
