"""What a training leaves: a denoiser, the affine map out of its scaled units, the levels it is walked through and the calibrated spread."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from boltzsample.flows.state import stored
from boltzsample.maps import Dense, Diagonal
from boltzsample.networks import Denoiser
from boltzsample.samplers import reverse
from boltzsample.samplers.annealed_langevin import AnnealedLangevin, Cooling
from boltzsample.samplers.probability_flow import Flowing, ProbabilityFlow
from boltzsample.samplers.reverse import Ancestral, Reverse, Rule
from boltzsample.schedules import Levels
from boltzsample.scores.pool import DTYPE
from boltzsample.scores.training import Glance
from boltzsample.streams import Stream

KERNELS = (reverse.Ancestral, reverse.EulerMaruyama, reverse.Exponential, reverse.Corrected)
RULES: dict[str, Any] = {c.__name__: c for c in (*KERNELS, ProbabilityFlow, AnnealedLangevin)}
Way = Rule | ProbabilityFlow | AnnealedLangevin  # from noise to data


@dataclass(frozen=True, eq=False)
class ScoreModel:
    """x = map(z), z the end of a path of `reverse`. history, looks: of its training; defense: the share of
    defensive paths that it is best drawn with."""

    map: Diagonal | Dense
    net: Denoiser
    levels: Levels
    spread: Tensor
    rule: Way
    history: Tensor
    looks: tuple[Glance, ...] = ()
    defense: float = 0.0

    @property
    def reverse(self) -> Reverse | Flowing | Cooling:
        """What draws, in scaled units."""
        if isinstance(self.rule, ProbabilityFlow):
            return Flowing(self.net, self.levels, self.rule.order, self.spread)
        if isinstance(self.rule, AnnealedLangevin):
            return Cooling(self.net, self.levels, self.rule)
        return Reverse(self.net, self.levels, self.rule, self.spread)

    def save(self, path: str | Path) -> Path:
        """One safetensors file; nothing is pickled."""
        from safetensors.torch import save_file

        tensors = {f"net.{name}": t for name, t in self.net.state_dict().items()}
        tensors |= {f"map.{name}": getattr(self.map, name) for name in ("m", _second(self.map))}
        tensors |= {"alpha": self.levels.alpha, "sigma": self.levels.sigma, "spread": self.spread, "history": self.history}
        how = {"dim": self.net.dim, "net": self.net.options, "rule": _described(self.rule), "looks": self.looks, "defense": self.defense}
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, path, {"scores": json.dumps(how)})
        return Path(path)

    @staticmethod
    def load(path: str | Path) -> ScoreModel:
        """The model of a file that `save` wrote. Raises ValueError, FileNotFoundError."""
        return _rebuilt(*stored(path, "scores", "score model", "ScoreModel.save"))


def _second(map: Diagonal | Dense) -> str:
    return "s" if isinstance(map, Diagonal) else "L"


def kernels_of(rule: Way) -> Rule:
    """The rule itself where it is one of kernels, else Ancestral: what training looks at weights by."""
    return Ancestral() if isinstance(rule, ProbabilityFlow | AnnealedLangevin) else rule


def _described(rule: Way) -> dict[str, Any]:
    known = {name: _described(v) if type(v).__name__ in RULES else v for name, v in vars(rule).items()}
    return {"class": type(rule).__name__, **known}


def _rule(how: dict[str, Any]) -> Way:
    parts = dict(how)
    name = parts.pop("class")
    if name not in RULES:
        raise ValueError(f"the saved model walks by {name!r}; this version knows {', '.join(RULES)}")
    made: Way = RULES[name](**{key: _rule(v) if isinstance(v, dict) else v for key, v in parts.items()})
    return made


def _rebuilt(tensors: dict[str, Tensor], how: dict[str, Any]) -> ScoreModel:
    net = Denoiser(int(how["dim"]), Stream(0).rng(DTYPE), **how["net"])
    try:
        net.load_state_dict({name.removeprefix("net."): t for name, t in tensors.items() if name.startswith("net.")})
    except RuntimeError as error:
        raise ValueError(f"the saved tensors do not fit the network: {str(error).splitlines()[-1].strip()}") from None
    net.requires_grad_(False)
    m = tensors["map.m"]
    map = Diagonal(m, tensors["map.s"]) if "map.s" in tensors else Dense(m, tensors["map.L"])
    levels, looks = Levels(tensors["alpha"], tensors["sigma"]), tuple(Glance(*look) for look in how["looks"])
    return ScoreModel(map, net, levels, tensors["spread"], _rule(how["rule"]), tensors["history"], looks, float(how.get("defense", 0.1)))
