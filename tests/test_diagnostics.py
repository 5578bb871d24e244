"""Every code about chains and functionals has a case that fires it and one that leaves it quiet; ArviZ is a second opinion."""

import math
from dataclasses import replace

import arviz as az
import pytest
import torch
from torch import Tensor

from boltzsample.draws import Draws
from boltzsample.estimates import expectation, numbers, probability, quantile
from boltzsample.estimates.chains import within
from boltzsample.estimates.columns import holm
from boltzsample.estimates.diagnostics import rank_rhat, split_rhat, stuck_and_twins
from boltzsample.estimates.stationarity import nested_rhat
from boltzsample.estimates.tails import khat
from boltzsample.flags import KINDS, Flag, Status
from tests.ar1 import chains, codes, draws_of, rng

GROUP = torch.arange(256) // 8


def typical(seed: int = 0) -> Tensor:
    """A stationary run as mcmc makes it: 256 chains of 16 draws, tau 3."""
    return chains(256, 16, 3, 1, seed)[..., 0]


def found(est, code: str) -> Flag:
    return next(f for f in est.flags if f.code == code)


# ---- quiet where nothing is wrong ----


def test_a_stationary_run_is_ok():
    starts = 3 * torch.randn(32, generator=rng(7), dtype=torch.float64).repeat_interleave(8)
    x = typical()
    d = Draws(x[..., None], x, starts=starts[:, None], group=GROUP, moves=torch.full((256,), 16))
    for f in (lambda v: v, torch.square, lambda v: v > 0, lambda v: v > 2, lambda v: v.exp()):
        est = expectation(f(x), d, f(starts))
        assert est.flags == () and est.status is Status.OK
    assert quantile(x, 0.95, d, starts).flags == ()


def test_false_alarms_are_rare():
    """400 runs: all checks together may speak in .5% of them (measured: .2-.5%); 10 or more has probability 3e-5 then."""
    starts = 3 * torch.randn(32, 400, generator=rng(7), dtype=torch.float64).repeat_interleave(8, 0)
    x, alarms = chains(256, 16, 2, 400, seed=11), 0
    for r in range(400):
        d = Draws(x[..., r : r + 1], x[..., r], starts=starts[:, r : r + 1], group=GROUP)
        alarms += expectation(x[..., r].square(), d, starts[:, r].square()).status is not Status.OK
    assert alarms < 10


# ---- stationarity ----


def test_nested_rhat():
    x = typical() + torch.randn(32, generator=rng(1), dtype=torch.float64).repeat_interleave(8)[:, None]
    est = expectation(x, replace(draws_of(x), group=GROUP))
    assert "NESTED_RHAT" in codes(est) and est.status is Status.UNTRUSTED
    assert "NESTED_RHAT" not in codes(expectation(x, draws_of(x)))  # not applicable without groups
    assert "NESTED_RHAT" not in codes(expectation(x, replace(draws_of(x), group=torch.arange(256))))
    one = x.clone()
    one[:8] = 30 + typical(3)[:8]  # a single group of chains sits in a far mode
    assert "NESTED_RHAT" in codes(expectation(one, replace(draws_of(x), group=GROUP)))


def test_nested_rhat_statistic_is_the_anova_f():
    from scipy import stats

    x = chains(20, 6, 1, 2)
    group = torch.tensor([3, 1, 1, 0, 3] * 4)
    rhat, f, df = nested_rhat(x, group)
    y = x.mean(1)
    exact = stats.f_oneway(*[y[group == k].numpy() for k in (0, 1, 3)])
    assert f.tolist() == pytest.approx(exact.statistic.tolist(), rel=1e-9) and df == (2, 17)
    assert (rhat >= 1).all()


def test_drift():
    x = typical()
    trend = torch.linspace(-0.3, 0.3, 16, dtype=torch.float64)
    assert "DRIFT" in codes(expectation(x + trend, draws_of(x)))
    assert "DRIFT" not in codes(expectation(x, draws_of(x)))
    assert "DRIFT" not in codes(expectation((x + trend)[:4], draws_of(x[:4])))  # too few chains to say


def test_start_memory():
    start = 3 * torch.randn(256, generator=rng(2), dtype=torch.float64)
    x = typical() + 0.2 * start[:, None]
    est = expectation(x, draws_of(x), start)
    assert "START_MEMORY" in codes(est)
    assert "START_MEMORY" not in codes(expectation(typical(), draws_of(x), start))
    assert "START_MEMORY" not in codes(expectation(x, draws_of(x)))
    unknown = start.clone()
    unknown[3] = math.nan
    assert "START_MEMORY" not in codes(expectation(x, draws_of(x), unknown))


def test_holm_keeps_the_family_level():
    p = torch.tensor([0.0004, 0.0002, 0.5, math.nan])
    assert holm(p, 1e-3).tolist() == [False, True, False, False]  # .0002 * 4 passes, .0004 * 3 does not


# ---- chains ----


def test_stuck_chains():
    x = typical()[..., None]
    assert codes_of(stuck_and_twins(Draws(x, x[..., 0]))) == set()
    x[5] = x[5, :1]
    assert codes_of(stuck_and_twins(Draws(x, x[..., 0]))) == {"STUCK_CHAIN"}
    est = expectation(x[..., 0], Draws(x, x[..., 0]))
    assert est.status is Status.UNTRUSTED and found(est, "STUCK_CHAIN").value == 1
    moves = torch.full((256,), 9)
    assert codes_of(stuck_and_twins(Draws(x, x[..., 0], moves=moves))) == set()  # it moved between the stored draws
    moves[7] = 0
    assert codes_of(stuck_and_twins(Draws(x, x[..., 0], moves=moves))) == {"STUCK_CHAIN"}
    all_still = x[:, :1].expand(256, 16, 1)
    assert "STUCK_CHAIN" in codes_of(stuck_and_twins(Draws(all_still, x[..., 0])))


def test_a_chain_that_stays_for_a_while_is_not_stuck():
    g = rng(4)
    x = torch.randn(64, 8, 1, generator=g, dtype=torch.float64)
    for t in range(1, 8):  # three in four proposals rejected
        stay = torch.rand(64, generator=g) < 0.75
        x[stay, t] = x[stay, t - 1]
    assert bool((x == x[:, :1]).all(1).any()) and codes_of(stuck_and_twins(Draws(x, x[..., 0]))) == set()


def test_duplicate_streams():
    x = typical()[..., None]
    x[9] = x[200]
    est = expectation(x[..., 0], Draws(x, x[..., 0]))
    assert "DUPLICATE_STREAM" in codes(est) and est.status is Status.UNTRUSTED


def test_same_starts():
    x = typical()[..., None]
    d = Draws(x, x[..., 0], starts=torch.ones(256, 1))
    assert found(expectation(x[..., 0], d), "SAME_STARTS").severity == "caution"
    assert "SAME_STARTS" not in codes(expectation(x[..., 0], replace(d, starts=torch.arange(256.0)[:, None])))


def test_few_switches():
    x = typical()
    mode = torch.where(torch.rand(256, 1, generator=rng(5)) < 0.3, -15.0, 15.0)  # no chain ever crosses
    est = probability(x + mode > 0, draws_of(x))
    assert "FEW_SWITCHES" in codes(est) and est.status is Status.UNTRUSTED
    one = torch.where(torch.arange(256)[:, None] == 0, -15.0, 15.0)
    assert "FEW_SWITCHES" in codes(probability(x + one > 0, draws_of(x)))  # one chain in the other mode, all others not
    assert "FEW_SWITCHES" not in codes(probability(x > 0, draws_of(x)))
    rare = probability(chains(64, 40, 1, 1)[..., 0] > 2.9, draws_of(torch.zeros(64, 40)))  # a few hits, each for one draw
    assert "RARE_EVENT" in codes(rare) and "FEW_SWITCHES" not in codes(rare)
    independent = x[:, :1] + mode > 0
    assert "FEW_SWITCHES" not in codes(probability(independent, draws_of(independent)))


def test_few_and_single_chains():
    x = chains(3, 2000, 2, 1)[..., 0]
    assert codes(expectation(x, draws_of(x))) == {"FEW_UNITS"}
    single = expectation(x[:1], draws_of(x[:1]))
    assert codes(single) == {"ONE_UNIT"} and single.status is Status.UNTRUSTED
    four = chains(4, 2000, 2, 1)[..., 0]
    assert codes(expectation(four, draws_of(four))) == set()


def test_tau_unresolved_and_floored():
    slow = chains(5, 500, 40, 1)[..., 0]
    assert "TAU_UNRESOLVED" in codes(expectation(slow, draws_of(slow)))
    fast = chains(5, 500, 2, 1)[..., 0]
    assert "TAU_UNRESOLVED" not in codes(expectation(fast, draws_of(fast)))
    antithetic = chains(3, 500, 0.05, 1)[..., 0]
    est = expectation(antithetic, draws_of(antithetic))
    assert found(est, "TAU_FLOORED").severity == "info"
    assert "TAU_FLOORED" not in codes(expectation(fast, draws_of(fast)))


def test_chains_that_stay_in_their_modes_are_worth_one_draw_each():
    x = typical() + torch.where(torch.rand(256, 1, generator=rng(5)) < 0.3, -15.0, 15.0)
    assert found(expectation(x, draws_of(x)), "TAU_UNRESOLVED").severity == "caution"
    assert "TAU_UNRESOLVED" not in codes(expectation(typical(), draws_of(x)))
    independent = x[:, :1]
    assert "TAU_UNRESOLVED" not in codes(expectation(independent, draws_of(independent)))


def test_bars_disagree():
    x = chains(8, 500, 1, 1)[..., 0] + 3 * torch.tensor([-1.0, 1.0])[torch.arange(8) % 2, None]
    y = x.clone()
    y[:, ::2] += 6 * torch.sign(-y.mean(1, keepdim=True))  # every chain visits both places in turn: antithetic inside, equal between
    assert "BARS_DISAGREE" not in codes(expectation(chains(8, 500, 1, 1)[..., 0], draws_of(x)))
    equal = chains(8, 4000, 1, 1)[..., 0]
    equal = equal - equal.mean(1, keepdim=True) + 1e-6 * torch.arange(8)[:, None]  # chain means closer than chance allows
    assert "BARS_DISAGREE" in codes(expectation(equal, draws_of(equal)))


def test_ess_low():
    x = typical()
    assert "ESS_LOW" not in codes(expectation(x, draws_of(x)))
    assert found(expectation(x[:64], draws_of(x[:64])), "ESS_LOW").severity == "caution"
    assert found(expectation(x[:16], draws_of(x[:16])), "ESS_LOW").severity == "untrusted"
    y = x[:, :1]
    assert codes(expectation(y, draws_of(y))) == set()  # 256 independent draws
    assert found(expectation(y[:50], draws_of(y[:50])), "ESS_LOW").severity == "caution"


def test_tail_ess_low():
    x = chains(256, 16, 1, 1)[..., 0]
    wide = torch.where(torch.arange(256) % 8 == 0, 12.0, 1.0)[:, None]  # one chain in eight lives in the tails, both of them
    assert "TAIL_ESS_LOW" in codes(expectation(x * wide, draws_of(x)))
    assert "TAIL_ESS_LOW" not in codes(expectation(x, draws_of(x)))


# ---- R-hat ----


def test_rhat_speaks_only_of_long_chains():
    x = chains(8, 1000, 3, 1)[..., 0]
    shifted = x + 0.5 * torch.arange(8)[:, None]
    assert found(expectation(shifted, draws_of(x)), "RHAT").severity == "untrusted"
    assert found(expectation(x + 0.08 * torch.arange(8)[:, None], draws_of(x)), "RHAT").severity == "caution"
    assert "RHAT" not in codes(expectation(x, draws_of(x)))
    scale = x * (1 + torch.arange(8))[:, None]  # equal means, unequal spread: seen by the folded version only
    assert "RHAT" in codes(expectation(scale, draws_of(x)))
    short = shifted[:, :90]
    assert "RHAT" not in codes(expectation(short, draws_of(short)))


def test_perfect_short_chains_are_not_accused_by_rhat():
    x = chains(250, 16, 3, 1)
    assert float(rank_rhat(x)[0]) > 1.08  # TRUST: 1.119, from perfect chains
    shown = numbers(x[..., 0], draws_of(x[..., 0]))
    assert shown.rhat.isnan() and shown.rhat_note.startswith("not applicable: 16 draws per chain")


def test_numbers():
    x = chains(256, 16, 3, 2)
    shown = numbers(x, replace(draws_of(x), group=GROUP))
    assert shown.bulk_ess.shape == (2,) and bool(((shown.bulk_ess > 1100) & (shown.bulk_ess < 2300)).all())
    assert bool((shown.tail_ess > 1100).all()) and bool((shown.nested_rhat < 1.05).all())
    long = chains(4, 1000, 3, 1)
    shown = numbers(long[..., 0], draws_of(long[..., 0]))
    assert 0.99 < float(shown.rhat) < 1.02 and shown.rhat_note == "" and shown.nested_rhat.isnan()
    for m, n in ((1, 1), (1, 5), (2, 2), (1, 200)):
        small = numbers(torch.randn(m, n, generator=rng()), draws_of(torch.zeros(m, n)))
        assert small.rhat.isnan() and small.rhat_note
    assert numbers(torch.ones(8, 10), draws_of(torch.ones(8, 10))).bulk_ess.isnan()


# ---- ArviZ as second opinion ----


@pytest.mark.parametrize(("m", "n", "tau"), [(4, 200, 1), (8, 1000, 6), (2, 500, 20), (4, 501, 0.6)])
def test_rhat_ess_and_mcse_agree_with_arviz(m, n, tau):
    x = chains(m, n, tau, 1)
    a = x[..., 0].numpy()
    even = x[:, : n // 2 * 2]
    assert float(rank_rhat(even)[0]) == pytest.approx(float(az.rhat(even[..., 0].numpy())), rel=1e-6)
    assert float(split_rhat(even)) == pytest.approx(float(az.rhat(even[..., 0].numpy(), method="split")), rel=1e-9)
    shown = numbers(x[..., 0], draws_of(x[..., 0]))
    assert float(shown.bulk_ess) == pytest.approx(float(az.ess(a, method="bulk")), rel=0.05)
    assert float(shown.tail_ess) == pytest.approx(float(az.ess(a, method="tail", prob=(0.05, 0.95))), rel=0.1)
    assert float(within(x).stderr) == pytest.approx(float(az.mcse(a, method="mean")), rel=0.03)


def test_khat_agrees_with_arviz():
    for k in (0.1, 0.5, 0.9):
        w = torch.rand(900, generator=rng(8), dtype=torch.float64).pow(-k)
        regular = float(az.psislw(w.log().numpy())[1])  # shrunk towards 1/2 by ten pseudo-observations, which is undone here
        assert float(khat(w[:, None])) == pytest.approx((regular * 100 - 5) / 90, abs=0.05)


# ---- functionals ----


def test_heavy_f():
    x = typical()
    est = expectation((3 * x).exp(), draws_of(x))  # a lognormal(3) mean: t intervals of exact draws cover .6
    assert found(est, "HEAVY_F").severity == "untrusted" and est.status is Status.UNTRUSTED
    assert "HEAVY_F" in codes(expectation(-(3 * x).exp(), draws_of(x)))  # the lower tail counts as well
    for f in (lambda v: v, torch.square, lambda v: v.exp(), lambda v: v.sign() * 1e3):
        assert "HEAVY_F" not in codes(expectation(f(x), draws_of(x)))


def test_a_mean_that_does_not_exist_is_refused_and_its_quantiles_are_not():
    cauchy = (math.pi * (torch.rand(4000, 1, 2, generator=rng(), dtype=torch.float64) - 0.5)).tan()
    cauchy[..., 1] = torch.randn(4000, 1, generator=rng(1), dtype=torch.float64)
    cauchy[..., 0] *= cauchy[..., 0].abs()  # k-hat 2
    est = expectation(cauchy, draws_of(cauchy[..., 0]))
    assert est.value[0].isnan() and est.stderr[0].isnan() and est[0].status is Status.UNTRUSTED
    assert est.value[1].isfinite() and est[1].status is Status.OK
    median = quantile(cauchy, 0.5, draws_of(cauchy[..., 0]))
    assert median.status is Status.OK and float(median.interval[0, 0]) < 0 < float(median.interval[1, 0])


def test_khat_of_exact_pareto_draws():
    u = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    for k in (0.2, 0.5, 1.0):
        assert float(khat(u.pow(-k)[:, None])) == pytest.approx(k, abs=0.06)
    assert khat(torch.ones(50, 1)).isnan().all()  # too few
    assert khat(torch.ones(500, 1)).isnan().all()  # ties


def test_every_code_raised_here_is_in_the_taxonomy_with_a_remedy():
    for code, kind in KINDS.items():
        assert code.isupper() and kind.meaning and kind.remedy and kind.severity in ("info", "caution", "untrusted")


def codes_of(flags) -> set[str]:
    return {f.code for f in flags}
