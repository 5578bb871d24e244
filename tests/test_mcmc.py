"""MCMC: fit adapts a copy, sample is frozen; what is drawn, from where, for which price; what it says of itself."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import boltzsample as bz
from boltzsample.kernels import HMC, MALA, ULA, RandomWalk
from boltzsample.kernels.chains import Chains
from boltzsample.samplers import warm_up
from targets import problem
from tests.counted import Counted
from tests.small import SMALL, codes, no_gradient, normal, sample, severity

CORRELATED = problem("gaussian-corr-d10").target
KERNELS = {"default": None, "HMC": HMC(L=3), "MALA": MALA(), "ULA": ULA(), "random walk": RandomWalk()}


def parts(obj: Any) -> dict[str, Any]:
    """Every value in a sampler, its kernel and its map; tensors as copies."""
    out: dict[str, Any] = {}
    for f in fields(obj):
        value = getattr(obj, f.name)
        if hasattr(value, "__dataclass_fields__"):
            out |= {f"{f.name}.{name}": v for name, v in parts(value).items()}
        else:
            out[f.name] = value.clone() if isinstance(value, Tensor) else value
    return out


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) if isinstance(v, Tensor) else v == b[k] for k, v in a.items())


# ---- fit ----


@pytest.mark.parametrize("name", KERNELS)
def test_fit_leaves_the_original_as_it_was(name: str) -> None:
    sampler = replace(SMALL, kernel=KERNELS[name])
    before = parts(sampler)
    fitted = sample(CORRELATED, sampler, witness=False).sampler
    assert same(parts(sampler), before)
    assert fitted is not sampler and fitted.map is not None and fitted.kernel is not None
    with pytest.raises(FrozenInstanceError):
        fitted.map = None


def test_refitting_a_fitted_sampler_leaves_it_as_it_was() -> None:
    fitted = sample(CORRELATED).sampler
    before = parts(fitted)
    again = sample(CORRELATED, fitted, seed=1).sampler
    assert same(parts(fitted), before) and not torch.equal(again.kernel.h, fitted.kernel.h)


def test_fit_adapts() -> None:
    """The correlated Gaussian's scales differ by 15: a dense map makes every coordinate N(0, 1) to within a third."""
    fitted = sample(CORRELATED, bz.MCMC(chains=64, warmup=100), witness=False).sampler
    x = problem("gaussian-corr-d10").exact_sampler(4000, torch.Generator().manual_seed(0))  # type: ignore[misc]
    z = fitted.map.pull(x)[0]
    assert bool((torch.cov(z.T) - torch.eye(10, dtype=torch.float64)).abs().max() < 0.35)
    assert torch.equal(fitted.kernel.h.shape == (1, 1) and fitted.kernel.h > 0, torch.ones(1, 1, dtype=torch.bool))


@pytest.mark.parametrize(("dense", "kind"), [(True, "Dense"), (False, "Dense"), (None, "Dense")])
def test_dense_or_diagonal(dense: bool | None, kind: str) -> None:
    """dense=False refines the wide source's dense map by a diagonal one."""
    assert type(sample(CORRELATED, replace(SMALL, dense=dense), witness=False).sampler.map).__name__ == kind
    starts = torch.randn(32, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = sample(CORRELATED, replace(SMALL, dense=dense), witness=False, starts=starts).sampler.map
    assert type(plain).__name__ == ("Diagonal" if dense is False else kind)


@pytest.mark.parametrize("warmup", [0, 1, 19, 20, 21])
def test_any_length_of_warm_up(warmup: int) -> None:
    result = sample(normal(), replace(SMALL, warmup=warmup, kernel=HMC(L=2)), starts=torch.zeros(1, 2), witness=False)
    assert bool(result.draws.x.isfinite().all()) and result.draws.x.shape == (32, 20, 2)
    assert abs(result.ledger["warm-up"][1] / 64 - warmup) <= 5


def test_warm_up_zero_adapts_nothing() -> None:
    fitted = sample(normal(), bz.MCMC(kernel=HMC(h=torch.tensor(0.3), L=2), chains=32, warmup=0), witness=False).sampler
    assert bool((fitted.kernel.h == torch.tensor(0.3)).all()) and fitted.kernel.L == 2


@pytest.mark.parametrize(("name", "value"), [("chains", 0), ("chains", 2.0), ("chains", True), ("warmup", -1), ("thin", 0), ("thin", "2")])
def test_bad_settings(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*; wanted an integer >="):
        bz.MCMC(**{name: value})


# ---- frozen in sample ----


def test_nothing_adapts_while_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = sample(CORRELATED).sampler
    before, kernel, map = parts(fitted), fitted.kernel, fitted.map

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("adaptation while sampling")

    monkeypatch.setattr(Chains, "retune", forbidden)
    monkeypatch.setattr(warm_up, "with_step", forbidden)
    result = sample(CORRELATED, fitted, fit=False)
    assert result.sampler is fitted and fitted.kernel is kernel and fitted.map is map
    assert same(parts(fitted), before)


def test_the_planted_adaptation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chains, "retune", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(normal())


def test_sampling_goes_on_where_the_warm_up_ended() -> None:
    """Chains that begin 1000 sd away are at home in the first draw: the warm-up took them there, and sample does not start anew."""
    result = sample(normal(), replace(SMALL, kernel=MALA(), warmup=150), starts=[[1e3, 0.0]], witness=False)
    assert float(result.draws.x[:, 0].norm(dim=-1).max()) < 6
    assert result.ledger["sampling"] == (0, 32 + 640)


def test_a_fitted_sampler_starts_anew_and_settles_first() -> None:
    first = sample(CORRELATED)
    again, once_more, other = (sample(CORRELATED, first.sampler, fit=False, seed=s) for s in (0, 0, 1))
    assert "warm-up" not in again.ledger and "pilot" not in again.ledger
    assert again.ledger["sampling"] == (0, 32 + 32 * (40 + 20) * first.sampler.kernel.L)
    assert torch.equal(again.draws.x, once_more.draws.x)
    for a, b in ((again, first), (again, other)):
        assert not bool((a.draws.x == b.draws.x).all(-1).any())


def test_replicates_of_a_fitted_sampler() -> None:
    fitted = sample(CORRELATED).sampler
    result = sample(CORRELATED, fitted, fit=False, replicates=3)
    assert len(result.replicates) == 3 and result.draws.x.shape == (96, 20, 10) and result.sampler is fitted
    a, b, c = (r.draws.x for r in result.replicates)
    assert not any(bool((u == v).all(-1).any()) for u, v in ((a, b), (b, c), (a, c)))


@pytest.mark.parametrize(("replicates", "fit"), [(1, False), (2, False), (1, True)])
def test_a_sampler_of_other_replicates_is_refused_in_words(replicates: int, fit: bool) -> None:
    fitted = sample(normal(), replicates=3).sampler
    with pytest.raises(ValueError, match="replicates"):
        sample(normal(), fitted, fit=fit, replicates=replicates)


def test_a_fitted_sampler_follows_the_runs_dtype() -> None:
    result = sample(normal(), sample(normal()).sampler, fit=False, dtype=torch.float32)
    assert result.draws.x.dtype == torch.float32


@pytest.mark.parametrize("kernel", [HMC, MALA, ULA, RandomWalk])
def test_a_float_for_a_step_size(kernel: Any) -> None:
    a, b = (sample(normal(), replace(SMALL, kernel=kernel(h=h)), witness=False) for h in (0.2, torch.tensor(0.2, dtype=torch.float64)))
    assert torch.equal(a.draws.x, b.draws.x)


# ---- what is drawn ----


@pytest.mark.parametrize(("n", "draws"), [(640, 20), (1, 16), (512, 16), (513, 17), (1000, 32)])
def test_n_is_shared_out_and_16_a_chain_at_least(n: int, draws: int) -> None:
    result = sample(normal(), replace(SMALL, kernel=MALA()), n, witness=False)
    assert result.draws.x.shape == (32, draws, 2) and result.draws.log_prob.shape == (32, draws)
    assert torch.allclose(result.draws.log_prob, normal().log_prob(result.draws.x))
    assert result.config["n"] == n


def test_units_are_replicate_after_replicate() -> None:
    result = sample(CORRELATED, replicates=3)
    whole = result.draws
    for r, part in enumerate(result.replicates):
        units = slice(32 * r, 32 * (r + 1))
        for name in ("x", "log_prob", "starts", "group", "moves"):
            assert torch.equal(getattr(part.draws, name), getattr(whole, name)[units])
    assert result.sampler.kernel.h.shape == (3, 1) and len(result.sampler.kernel.h.unique()) == 3
    assert result.sampler.map.m.shape == (3, 1, 10)


def test_superchains_share_their_starts() -> None:
    draws = sample(normal()).draws
    assert draws.group is not None and draws.starts is not None
    assert draws.group.tolist() == [c // 8 for c in range(32)]
    assert all(len(draws.starts[draws.group == g].unique(dim=0)) == 1 for g in range(4))
    assert len(draws.starts.unique(dim=0)) == 4
    few = sample(normal(), replace(SMALL, chains=16)).draws
    assert few.group is not None and few.group.tolist() == list(range(16))


def test_thinning_keeps_every_third() -> None:
    kernel = MALA()
    every = sample(normal(), bz.MCMC(kernel=kernel, chains=32, warmup=20), 32 * 60, witness=False)
    third = sample(normal(), bz.MCMC(kernel=kernel, chains=32, warmup=20, thin=3), 32 * 20, witness=False)
    assert torch.equal(third.draws.x, every.draws.x[:, 2::3]) and torch.equal(third.draws.moves, every.draws.moves)
    assert third.draws.acceptance == pytest.approx(every.draws.acceptance)
    assert third.ledger["sampling"] == every.ledger["sampling"]


def test_moves_and_acceptance_are_what_happened() -> None:
    draws = sample(normal(), bz.MCMC(kernel=RandomWalk(), chains=32, warmup=40, thin=1), 32 * 100, witness=False).draws
    seen = (draws.x.diff(dim=1) != 0).any(-1).sum(1)
    assert bool(((draws.moves - seen >= 0) & (draws.moves - seen <= 1)).all())  # the first move is not between two draws
    assert draws.acceptance == pytest.approx(float(draws.moves.double().mean()) / 100)


# ---- the price ----

RUNS: dict[str, dict[str, Any]] = {
    **{name: {"method": replace(SMALL, kernel=kernel)} for name, kernel in KERNELS.items()},
    "three replicates": {"replicates": 3},
    "unfitted": {"fit": False},
    "no witness": {"witness": False},
    "thinned": {"method": replace(SMALL, thin=2)},
    "modes": {"modes": [[0.5, 0.5]]},
    "starts": {"starts": [[0.0, 1.0], [1.0, 1.0]]},
    "starts alone": {"starts": [0.0, 1.0], "witness": False},
    "budget": {"budget": 60_000},
    "chunks": {"method": replace(SMALL, chains=96), "chunk": 1},
}


@pytest.mark.parametrize("name", RUNS)
def test_the_ledger_is_what_the_target_counted(name: str) -> None:
    counted = Counted(normal())
    result = sample(counted, **RUNS[name])
    assert result.evaluations == counted.total
    assert sum(b for _, b in result.ledger.values()) == counted.grad_rows


@pytest.mark.parametrize("name", ["two-modes-far", "gaussian-corr-d10", "student-t5-d10", "banana"])
def test_the_ledger_is_exact_in_harder_places(name: str) -> None:
    counted = Counted(problem(name).target)
    assert sample(counted, replace(SMALL, kernel=HMC(L=3))).evaluations == counted.total


def test_the_ledger_without_a_gradient() -> None:
    counted = Counted(no_gradient())
    result = sample(counted)
    assert result.evaluations == counted.total
    assert result.ledger["preflight"][1] == counted.grad_rows == 4  # asked once whether there is one


def test_fitting_apart_costs_the_same() -> None:
    counted = Counted(CORRELATED)
    fitted = sample(counted).sampler
    before = counted.total
    assert sample(counted, fitted, fit=False).evaluations == counted.total - before


# ---- what it says ----


def test_ula_is_unadjusted_and_no_other() -> None:
    assert severity(sample(normal(), replace(SMALL, kernel=ULA())), "UNADJUSTED") == "caution"
    for kernel in (MALA(), HMC(L=2), RandomWalk()):
        assert "UNADJUSTED" not in codes(sample(normal(), replace(SMALL, kernel=kernel), witness=False))


def test_a_warm_up_cut_short_is_noted() -> None:
    result = sample(normal(), bz.MCMC(kernel=HMC(L=8), chains=64, warmup=400), budget=80_000)
    assert any(f.code == "STOPPED_EARLY" and f.detail.endswith("of 400 warm-up steps") for f in result.flags)
    enough = sample(normal(), bz.MCMC(kernel=HMC(L=2), chains=64, warmup=40), budget=80_000)
    assert "STOPPED_EARLY" not in codes(enough)


@pytest.mark.parametrize("name", ["default", "HMC", "MALA", "random walk"])
def test_moments_of_a_correlated_gaussian(name: str) -> None:
    """|z| < 4.5 for 20 moments of 4 kernels: false failure 6e-4."""
    p = problem("gaussian-corr-d10")
    thin = 12 if name == "random walk" else 2
    sampler = bz.MCMC(kernel=KERNELS[name], chains=64, warmup=150, thin=thin)
    result = sample(p.target, sampler, 64 * 40, witness=False)
    for quantity, est in (("mean", result.means), ("second_moment", result.expectation(lambda x: x.square()))):
        assert bool(((est.value - p.truth[quantity].value) / est.stderr).abs().max() < 4.5)


def test_trajectories_do_not_shrink_at_a_hard_edge() -> None:
    """Half of them may leave the support; where each of those counted as an error, h was .001 and the means 7 to 24 errors off."""
    p = problem("truncated-gaussian")
    r = bz.sample(p.target, "mcmc", seed=0, witness=False)
    assert 0.3 < r.draws.acceptance < 0.7 and float(r.sampler.kernel.h) > 0.03
    z = (r.means.value - p.truth["mean"].value) / r.means.stderr
    assert z.abs().max() < 5  # 5 of them: 3e-6
