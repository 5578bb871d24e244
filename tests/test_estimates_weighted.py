"""Weighted draws: p = N(0, 1), proposals N(loc, s^2). k-hat of the weights is about 1 - s^2.

Coverage rule: 200 replicates, red at 174 or fewer, which a bar that covers .95 meets with probability 9e-6.
"""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

import boltzsample as bz
from boltzsample.draws import Draws
from boltzsample.estimates import covariance, expectation, probability, quantile, sd
from boltzsample.estimates.evidence import log_z
from boltzsample.estimates.tails import ends, khat
from boltzsample.estimates.weighted import weights
from boltzsample.flags import Status
from tests.ar1 import chains, codes, rng

LOG_Z = 0.5 * math.log(2 * math.pi)


def proposal(s: float, m: int, n: int = 1, loc: float = 0.0, seed: int = 0) -> tuple[Tensor, Draws]:
    x = loc + s * torch.randn(m, n, generator=rng(seed), dtype=torch.float64)
    log_w = -x.square() / 2 + ((x - loc) / s).square() / 2 + math.log(s) + LOG_Z
    return x, Draws(x[..., None], -x.square() / 2, log_weight=log_w)


@pytest.mark.parametrize(("m", "n"), [(1000, 1), (40, 25)])
def test_a_good_proposal_is_ok_and_covered(m, n):
    inside = dict.fromkeys(("x2", "p", "sd", "q", "log_z"), 0)
    for seed in range(200):
        x, d = proposal(1.3, m, n, 0.2, seed)
        answers = {
            "x2": (expectation(x.square(), d), 1.0),
            "p": (probability(x > 1, d), 0.158655),
            "sd": (sd(x, d), 1.0),
            "q": (quantile(x, 0.9, d), 1.281552),
            "log_z": (log_z(d), LOG_Z),
        }
        for name, (est, truth) in answers.items():
            inside[name] += bool((est.interval[0] <= truth) & (truth <= est.interval[1]))
            assert seed > 20 or est.status is Status.OK, (name, est.flags)
    assert min(inside.values()) >= 175, inside


def test_a_narrow_proposal_is_flagged():
    """TRUST finding 1: s = .7, f = x^2 covers .80, and the usual k-hat rule flags next to nothing."""
    flagged = 0
    for seed in range(50):
        x, d = proposal(0.7, 1000, seed=seed)
        flagged += expectation(x.square(), d).status is not Status.OK
    assert flagged >= 48
    x, d = proposal(0.45, 4000)
    assert {"KHAT_W", "KHAT_F"} <= codes(expectation(x.square(), d))
    assert not {"KHAT_W", "KHAT_F", "CONCENTRATION", "ESS_LOW"} & codes(expectation(x, proposal(1.3, 4000)[1]))


def test_a_lump_of_bounded_influences_is_no_heavy_tail():
    """10 in 1000 values in a lump from 3.5 to 4.2 over a thin rest: one fit over both says k > .5."""
    u = torch.rand(20_000, 1, generator=rng(0), dtype=torch.float64)
    lump = torch.where(u < 0.01, 3.5 + 0.7 * torch.rand(20_000, 1, generator=rng(1)).double(), u)
    heavy = torch.rand(20_000, 1, generator=rng(2), dtype=torch.float64).pow(-0.6)
    draws = Draws(u[..., None], u, log_weight=torch.zeros_like(u))
    assert float(khat((lump - lump.mean()).abs())) > 0.5 and "KHAT_F" not in codes(expectation(lump, draws))
    assert "KHAT_F" in codes(expectation(heavy, draws))
    small = slice(0, 10_000)  # too few to see the end
    assert not bool(ends(lump[small])) and bool(ends(lump)) and not bool(ends(heavy))


def test_draws_of_weight_zero_count_in_log_z():
    """The density 1 on x < .2, drawn uniformly on [0, 1]: four draws in five weigh nothing, and Z = .2, not 1."""
    x = torch.rand(4000, 1, generator=rng(4), dtype=torch.float64)
    est = log_z(Draws(x[..., None], x, log_weight=torch.where(x < 0.2, 0.0, -math.inf)))
    assert abs(float(est.value) - math.log(0.2)) < 4.5 * float(est.stderr) < 0.2


def test_the_bar_is_the_jackknife():
    x, d = proposal(1.2, 30, 4)
    w = weights(d.log_weight)
    mean = float((w.share * x).sum())
    left = []
    for u in range(30):
        keep = [v for v in range(30) if v != u]
        left.append(float((w.share[keep] * x[keep]).sum() / w.share[keep].sum()))
    left = torch.tensor(left, dtype=torch.float64)
    est = expectation(x, d)
    moved = (left - mean).square().sum() * 29 / 30
    assert float(est.stderr) == pytest.approx(float(moved.sqrt()), rel=1e-9)
    assert float(est.value) == pytest.approx(mean, abs=0.3 * float(est.stderr))


def test_equal_weights_agree_with_no_weights():
    x = chains(200, 1, 1, 2)
    plain, weighted = Draws(x, x[..., 0]), Draws(x, x[..., 0], log_weight=torch.full((200, 1), 3.0))
    a, b = expectation(x, plain), expectation(x, weighted)
    assert torch.allclose(a.value, b.value, atol=1e-12) and torch.allclose(a.stderr, b.stderr, rtol=0.01)
    assert torch.allclose(covariance(x, plain).value, covariance(x, weighted).value, rtol=0.02, atol=1e-3)
    assert torch.allclose(quantile(x, 0.3, plain).value, quantile(x, 0.3, weighted).value)


def test_one_draw_that_carries_everything():
    x, d = proposal(1.3, 1000)
    d.log_weight[3] = 9.0
    est = expectation(x, d)
    assert "CONCENTRATION" in codes(est) and est.status is Status.UNTRUSTED
    assert "CONCENTRATION" not in codes(expectation(x, proposal(1.3, 1000)[1]))


def test_a_far_draw_of_plain_weight_is_no_fault_of_the_proposal():
    """Equal weights, and one of 3,200 Gaussian draws at 5: it carries 8% of the bar of E x^2, as it may among exact draws."""
    x = chains(3200, 1, 1, 50)  # fifty functions: k-hat above .3 is met in one of a hundred (5 and more of fifty: 2e-4)
    x[7] = 5.0
    even = torch.zeros(3200, 1)
    found = expectation(x.square(), Draws(x, x[..., 0], log_weight=even))
    assert sum("CONCENTRATION" in codes(found[i]) for i in range(50)) <= 4
    even[7] = 1.2
    assert "CONCENTRATION" in codes(expectation(x.square(), Draws(x, x[..., 0], log_weight=even)))
    x[7], even[7] = 7.0, 0.0  # a quarter of the bar
    assert "CONCENTRATION" in codes(expectation(x.square(), Draws(x, x[..., 0], log_weight=even)))


def _far_draws(q, n):
    """(x, log-weights 0) of the quantiles (i - 1/2) / n of a distribution, both (n, 1); the first is the lowest."""
    return torch.as_tensor(q.ppf((torch.arange(n).numpy() + 0.5) / n))[:, None], torch.zeros(n, 1, dtype=torch.float64)


def test_plain_weight_excuses_no_draw_where_f_has_a_tail_of_its_own():
    """Of a Student t_5 the highest of 20,000 carries 8% of the bar of E x^2, whose tail has k = .4; some weight is not calm."""
    x, w = _far_draws(stats.t(5), 20_000)
    w[10_000] = math.log(8.0)
    assert "CONCENTRATION" in codes(expectation(x.square(), Draws(x[..., None], x, log_weight=w)))


def test_where_no_weight_is_large_a_quarter_is_the_limit():
    """3,200 quantiles of a Gaussian, the first moved out to 3 and made 4 means heavy: it carries 14% of the bar of E x^2. Not so with
    a middle draw of 8 means, nor further out (36%), nor where k-hat of the influences is above .4 (15% of the bar for a t_4)."""
    for far, middle, named in ((3.0, 1.0, False), (3.0, 8.0, True), (4.0, 1.0, True)):
        x, w = _far_draws(stats.norm, 3200)
        x[0], w[0], w[1600] = -far, math.log(4.0), math.log(middle)
        assert ("CONCENTRATION" in codes(expectation(x.square(), Draws(x[..., None], x, log_weight=w)))) is named
    x, w = _far_draws(stats.t(4), 20_000)
    assert "CONCENTRATION" in codes(expectation(x.square(), Draws(x[..., None], x, log_weight=w)))


def test_an_event_of_few_hits_is_no_concentration():
    """64 hits in 3,200 draws, one of them six times as heavy: it carries a third of the bar, and the hits are worth 48 equal ones. Twelve
    times as heavy it carries two thirds."""
    x = (torch.arange(3200) % 50 == 0).double()[:, None, None]
    w = torch.zeros(3200, 1).double()
    for factor, status in ((6.0, Status.OK), (12.0, Status.UNTRUSTED)):
        w[50] = math.log(factor)
        e = probability(x[..., 0] > 0, Draws(x, x[..., 0], log_weight=w.clone(), witnesses=("me",)))
        assert ("CONCENTRATION" in codes(e)) is (status is Status.UNTRUSTED) and e.status is status


def test_weights_that_are_none():
    x, d = proposal(1.3, 100)
    for bad in (-math.inf, math.nan, math.inf):
        broken = Draws(d.x, d.log_prob, log_weight=torch.full((100, 1), bad))
        for est in (expectation(x, broken), sd(x, broken), quantile(x, 0.5, broken), log_z(broken)):
            assert est.value.isnan() and "BAD_WEIGHTS" in codes(est) and est.status is Status.UNTRUSTED
    assert "BAD_WEIGHTS" not in codes(log_z(d))


def test_nan_of_f_at_weight_zero_is_left_out_and_counted():
    x, d = proposal(1.3, 1000)
    d.log_weight[:5] = -math.inf
    y = x.clone()
    y[:5] = math.nan
    est = expectation(y, d)
    assert float(est.value) == pytest.approx(float(expectation(x, d).value), rel=1e-9) and est.status is Status.OK
    note = next(f for f in est.flags if f.code == "NONFINITE_F")
    assert note.severity == "info" and note.value == 5
    y[9] = math.nan
    assert expectation(y, d).status is Status.UNTRUSTED


def test_events_no_weighted_draw_has_seen():
    x, d = proposal(1.3, 1000)
    est = probability(x > 50, d)
    assert "RARE_EVENT" in codes(est) and float(est.interval[1]) == pytest.approx(3 / weights(d.log_weight).ess)
    assert expectation(torch.full_like(x, 2.0), d).stderr.isnan()


def test_log_z_of_shifted_weights_and_few_units():
    _, d = proposal(1.3, 1000)
    est = log_z(d)
    far = log_z(Draws(d.x, d.log_prob, log_weight=d.log_weight + 5000))
    assert float(far.value) - 5000 == pytest.approx(float(est.value), abs=1e-9)
    assert float(far.stderr) == pytest.approx(float(est.stderr), rel=1e-9)
    assert "at 95% whatever the weights" in est.method
    units = log_z(Draws(d.x, d.log_prob, log_z=torch.randn(50, generator=rng()) * 0.1))
    assert units.status is Status.OK and float(units.df) == 49
    alone = log_z(Draws(d.x[:1], d.log_prob[:1], log_weight=d.log_weight[:1]))
    assert alone.stderr.isnan() and alone.status is Status.UNTRUSTED
    assert log_z(Draws(d.x, d.log_prob, log_weight=torch.zeros(1000, 1))).stderr.isnan()  # never a bar of zero


def test_log_z_without_weights_says_so():
    est = log_z(Draws(torch.zeros(8, 5, 1), torch.zeros(8, 5)))
    assert est.value.isnan() and codes(est) == {"NO_LOG_Z"} and est.status is Status.UNTRUSTED


def test_a_wide_spread_of_log_z_is_told():
    _, d = proposal(1.3, 1000)
    wild = Draws(d.x, d.log_prob, log_z=torch.randn(50, generator=rng()) * 2)
    assert "LOG_Z_SPREAD" in codes(log_z(wild)) and "LOG_Z_SPREAD" not in codes(log_z(d))


def test_a_far_draw_of_no_weight_costs_no_digits() -> None:
    """A heavy-tailed proposal throws one draw to 1e9 with weight e^-90: the weighted mean, sd and covariance of x^2 must not notice."""
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_w = -0.1 * x[:, 0].square()
    clean = bz.result(bz.Draws.from_arrays(x, log_weight=log_w))
    far_x, far_w = torch.cat([x, torch.full((1, 2), 1e9).double()]), torch.cat([log_w, torch.tensor([-90.0]).double()])
    far = bz.result(bz.Draws.from_arrays(far_x, log_weight=far_w))
    for ask in (lambda r: r.expectation(lambda x: x**2), lambda r: r.sd(), lambda r: r.covariance(), lambda r: r.quantile(p=0.9)):
        a, b = ask(clean), ask(far)
        assert torch.allclose(a.value, b.value, rtol=1e-3) and torch.allclose(a.stderr, b.stderr, rtol=1e-2)
