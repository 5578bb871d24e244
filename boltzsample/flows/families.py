"""Flows by name: each a few lines over layers.py, starting as the identity.

    name              T                                                        one pass       inverse
    affine-iaf        one affine autoregressive layer                          base -> x      dim passes
    iaf               `layers` of them, the order reversed between             base -> x      dim passes
    maf               the same, held the other way round                       x -> base      one pass (pushing takes dim passes)
    realnvp           affine couplings, halves in turn, shuffled in pairs      both           one pass
    nice              additive couplings, then one scale                       both           one pass
    spline-coupling   rational-quadratic splines on +-`bound`, then a scale    both           one pass
    gaussianization   rotations and elementwise Gaussianization                base -> x      bisection
    ffjord            the flow of a neural ODE for a unit of time              both           one more solve
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from boltzsample.flows import elementary
from boltzsample.flows import layers as parts
from boltzsample.flows.base import Base, DefensiveBase
from boltzsample.flows.continuous import Continuous
from boltzsample.flows.flow import Flow
from boltzsample.maps import Dense, Diagonal
from boltzsample.streams import Rng

Hidden = Sequence[int]
Maker = Callable[..., parts.Stack]

SMOOTH = nn.SiLU  # gradients of the log-density in the latent space are continuous
LONE_SLOPE = 1e-6  # one autoregressive layer has to reach every scale alone, couplings share the work


def realnvp(dim: int, rng: Rng, layers: int = 8, hidden: Hidden = (64, 64)) -> parts.Stack:
    """Affine couplings (Dinh, Sohl-Dickstein & Bengio 2017)."""
    return parts.Stack(*_couplings(dim, rng, layers, parts.affine(), hidden))


def nice(dim: int, rng: Rng, layers: int = 8, hidden: Hidden = (64, 64)) -> parts.Stack:
    """Additive couplings and one scale (Dinh, Krueger & Bengio 2015)."""
    return parts.Stack(*_couplings(dim, rng, layers, parts.additive(), hidden), elementary.Scale(dim))


def spline_coupling(
    dim: int, rng: Rng, layers: int = 4, hidden: Hidden = (64, 64), bins: int = 8, bound: float = 10.0
) -> parts.Stack:
    """Neural splines (Durkan, Bekasov, Murray & Papamakarios 2019) behind a scale layer, so that the interval is one of units, not of x."""
    return parts.Stack(*_couplings(dim, rng, layers, parts.spline(bins, bound), hidden), elementary.Scale(dim))


def affine_iaf(dim: int, rng: Rng, hidden: Hidden = (64, 64)) -> parts.Stack:
    """One inverse autoregressive layer."""
    return iaf(dim, rng, 1, hidden)


def iaf(dim: int, rng: Rng, layers: int = 2, hidden: Hidden = (64, 64)) -> parts.Stack:
    """Inverse autoregressive flow (Kingma et al. 2016)."""
    return parts.Stack(*_autoregressive(dim, layers, hidden, inverted=False))


def maf(dim: int, rng: Rng, layers: int = 2, hidden: Hidden = (64, 64)) -> parts.Stack:
    """Masked autoregressive flow (Papamakarios, Pavlakou & Murray 2017): for densities of given draws; sampling takes dim passes."""
    return parts.Stack(*_autoregressive(dim, layers, hidden, inverted=True))


def gaussianization(dim: int, rng: Rng, layers: int = 3, components: int = 8) -> parts.Stack:
    """Gaussianization (Chen & Gopinath 2000) with trained rotations (Meng, Song, Song & Ermon 2020)."""
    blocks = [(elementary.Rotate(dim), elementary.Gaussianize(dim, components)) for _ in range(layers)]
    return parts.Stack(*(part for block in blocks for part in block), elementary.Scale(dim))


def ffjord(dim: int, rng: Rng, hidden: Hidden = (64, 64), tolerance: float = 1e-6, probes: int | None = None) -> parts.Stack:
    """A continuous flow (Grathwohl et al. 2019). probes=None: the exact trace up to 64 dimensions, 2 of Hutchinson's probes beyond."""
    return parts.Stack(Continuous(dim, hidden, tolerance, probes if probes is not None else 0 if dim <= 64 else 2))


MAKERS: dict[str, Maker] = {
    "affine-iaf": affine_iaf,
    "realnvp": realnvp,
    "nice": nice,
    "spline-coupling": spline_coupling,
    "maf": maf,
    "iaf": iaf,
    "gaussianization": gaussianization,
    "ffjord": ffjord,
}


def make_flow(
    family: str, dim: int, rng: Rng, *, base: Base | None = None, whitening: Diagonal | Dense | None = None, **options: Any
) -> Flow:
    """A flow of a named family, near the identity, in the rng's dtype and on its device. base: the defensive one by default.

    Raises ValueError for a family or an option that is not known.

    >>> from boltzsample.streams import Stream
    >>> make_flow("affine-iaf", 10, Stream(0).rng())
    Flow('affine-iaf', dim=10, base=DefensiveBase(...), whitening=None, parameters=6164, torch.float64)
    """
    if family not in MAKERS:
        raise ValueError(f"flow family {family!r} is not known; known ones: {', '.join(MAKERS)}; or pass a zuko flow to Flow.from_zuko")
    known = list(inspect.signature(MAKERS[family]).parameters)[2:]
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(f"flow family {family!r} has no option {unknown[0]!r}; it has {', '.join(known)}")
    layers = _built(MAKERS[family], dim, rng, options)
    return Flow(DefensiveBase(dim) if base is None else base, layers, whitening, family, dict(options))


def _family(name: str) -> Callable[..., Flow]:
    def make(dim: int, rng: Rng, **options: Any) -> Flow:
        return make_flow(name, dim, rng, **options)

    make.__name__ = name
    return make


FAMILIES: Mapping[str, Callable[..., Flow]] = {name: _family(name) for name in MAKERS}  # name -> maker(dim, rng, **options)


# ---- how they are put together ----


def _couplings(dim: int, rng: Rng, layers: int, f: parts.Univariate, hidden: Hidden) -> Iterator[nn.Module]:
    """Couplings that move the halves in turn; a new random order for each pair, undone at the end."""
    if dim == 1:
        yield parts.Elementwise(1, f)
        return
    total = torch.arange(dim)
    for i in range(layers):
        if i % 2 == 0 and dim > 2:
            order = _shuffle(dim, rng)
            total = total[order]
            yield elementary.Permute(order)
        yield parts.Coupling(dim, i % 2 == 1, f, hidden, SMOOTH)
    if dim > 2:
        yield elementary.Permute(total.argsort())


def _autoregressive(dim: int, layers: int, hidden: Hidden, inverted: bool) -> Iterator[nn.Module]:
    for i in range(layers):
        order, f = torch.arange(dim), parts.affine(LONE_SLOPE)
        if dim == 1:
            yield parts.Elementwise(1, f)
        else:
            yield parts.Autoregressive(order.flip(0) if i % 2 else order, f, hidden, SMOOTH, inverted)


def _shuffle(dim: int, rng: Rng) -> Tensor:
    return rng.uniform(dim).argsort().cpu()


def _built(make: Maker, dim: int, rng: Rng, options: Mapping[str, Any]) -> parts.Stack:
    """The layers, their parameters drawn from `rng`: zuko's constructors would draw from the global generator."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        stack = make(dim, rng, **options).to(device=rng.generator.device, dtype=rng.dtype)
        for module in stack.modules():
            if isinstance(module, nn.Sequential):
                _start_network(module, rng)
            if isinstance(module, elementary.Gaussianize | elementary.Rotate):  # identical components would stay identical
                for p in module.parameters(recurse=False):
                    p.copy_(0.1 * rng.normal(*p.shape))
    return stack


def _start_network(network: nn.Sequential, rng: Rng) -> None:
    """Weights and biases uniform within +-1/sqrt(inputs), those of the last layer zero."""
    linear: list[Any] = [m for m in network if hasattr(m, "weight")]
    for layer in linear:
        for p in (layer.weight, layer.bias):
            p.copy_((2 * rng.uniform(*p.shape) - 1) / layer.weight.shape[-1] ** 0.5)
    for p in (linear[-1].weight, linear[-1].bias):
        p.zero_()
