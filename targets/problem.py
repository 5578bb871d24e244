"""A Problem is a Target, what is known about it, and (where one exists) an exact sampler.

Samplers are handed `problem.target` and nothing else: a truth is not part of a Target. What is known stands in a truth
card, `targets/truth/NAME.json`: quantities with their standard errors and how each was obtained, and the command that
derives them again (`python -m targets.make_truth NAME`). Exact quantities carry stderr 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from boltzsample.target import Target

CARDS = Path(__file__).parent / "truth"

ExactSampler = Callable[[int, torch.Generator], Tensor]


@dataclass(frozen=True)
class Quantity:
    """One known number, or one per coordinate or mode.

    `name` is one of

        mean            E x_i                                   value (dim,)
        second_moment   E x_i^2                                 value (dim,)
        sd              sqrt(E x_i^2 - (E x_i)^2)               value (dim,)
        tail            P(x_0 > at)                             value ()      at: ()
        positive        P(x_i > 0)                              value (dim,)
        mode_weights    P(centre k is the nearest one to x)     value (k,)    at: (k, dim), the centres
        energy          E[-log_prob]                            value ()
        log_z           log of the integral of exp log_prob     value ()
    """

    name: str
    value: Tensor
    stderr: Tensor  # of value's shape; 0 = exact
    how: str
    at: Tensor | None = None

    @property
    def is_expectation(self) -> bool:
        """Whether the value is E f(x) of `f` below."""
        return self.name in ("mean", "second_moment", "tail", "positive", "mode_weights")

    def f(self, x: Tensor) -> Tensor:
        """The function whose expectation this is: x (..., dim) to (...) or (..., k)."""
        at = torch.zeros(()) if self.at is None else self.at.to(x)
        if self.name == "mean":
            return x
        if self.name == "second_moment":
            return x.square()
        if self.name == "tail":
            return (x[..., 0] > at).to(x.dtype)
        if self.name == "positive":
            return (x > 0).to(x.dtype)
        if self.name == "mode_weights":
            nearest = (x[..., None, :] - at).square().sum(-1).argmin(-1)  # (...)
            return torch.nn.functional.one_hot(nearest, at.shape[0]).to(x.dtype)
        raise ValueError(f"{self.name!r} is not an expectation of one function; take `value` and `stderr` instead")


@dataclass(frozen=True)
class Truth:
    """What is known about one problem: `truth["mean"].value`, iteration over quantities, `provenance` in words and numbers."""

    problem: str
    quantities: Mapping[str, Quantity]
    provenance: Mapping[str, Any]

    def __getitem__(self, name: str) -> Quantity:
        if name not in self.quantities:
            raise KeyError(f"the card of {self.problem!r} has no {name!r}; it has {', '.join(self.quantities)}")
        return self.quantities[name]

    def __contains__(self, name: object) -> bool:
        return name in self.quantities

    def __iter__(self) -> Iterator[Quantity]:
        return iter(self.quantities.values())


@dataclass(frozen=True)
class Problem:
    """A named target with its truth. `exact_sampler(n, generator)` gives n independent draws (n, dim) in float64, or is None."""

    name: str
    target: Target
    description: str
    exact_sampler: ExactSampler | None = None
    starts: Tensor | None = None  # (starts, dim)
    known: Truth | None = None  # where there is no card

    @property
    def truth(self) -> Truth:
        """What is known, or the truth card, read from its file when asked for."""
        return read_truth(self.name) if self.known is None else self.known


@dataclass(frozen=True)
class Pushforward:
    """Exact draws x = push(z), z ~ N(0, I). With push invertible, log p(x) = log N(z; 0, I) - log |det dpush/dz|."""

    push: Callable[[Tensor], Tensor]
    dim: int

    def __call__(self, n: int, generator: torch.Generator) -> Tensor:
        z = torch.randn(n, self.dim, generator=generator, device=generator.device, dtype=torch.float64)
        return self.push(z)


def read_truth(name: str, folder: Path = CARDS) -> Truth:
    """The truth card of the problem called `name`."""
    path = folder / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(f"no truth card {path}; `python -m targets.make_truth --help` says how cards are made")
    card = json.loads(path.read_text(encoding="utf-8"))
    quantities = {entry["quantity"]: _from_json(entry) for entry in card["quantities"]}
    return Truth(card["problem"], quantities, card["provenance"])


def write_truth(truth: Truth, folder: Path = CARDS) -> Path:
    """Write the card and return its path."""
    path = folder / f"{truth.problem}.json"
    card = {"problem": truth.problem, "quantities": [_to_json(q) for q in truth], "provenance": truth.provenance}
    path.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return path


def _from_json(entry: Mapping[str, Any]) -> Quantity:
    value = torch.tensor(entry["value"], dtype=torch.float64)
    stderr = torch.tensor(entry["stderr"], dtype=torch.float64).expand(value.shape)
    at = torch.tensor(entry["at"], dtype=torch.float64) if "at" in entry else None
    return Quantity(entry["quantity"], value, stderr, entry["how"], at)


def _to_json(q: Quantity) -> dict[str, Any]:
    stderr = 0.0 if not q.stderr.any() else q.stderr.tolist()
    entry = {"quantity": q.name, "value": q.value.tolist(), "stderr": stderr, "how": q.how}
    return entry if q.at is None else entry | {"at": q.at.tolist()}
