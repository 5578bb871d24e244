"""Error bars: coverage at fixed seeds, exactness of simple cases, invariances, and never a bar of zero.

Coverage rule (TRUST section 3): 400 replicates, red at 356 hits or fewer. A bar that covers .95 fails with probability 1.4e-6 a case,
one that covers .85 with probability .99. All replicates of a case are columns of one call.
"""

import math
from dataclasses import replace

import pytest
import torch
from scipy import special, stats

from boltzsample.draws import Draws, Estimate
from boltzsample.errors import ShapeError
from boltzsample.estimates import covariance, expectation, probability, quantile, sd
from boltzsample.estimates.diagnostics import doubtful_tails
from boltzsample.flags import Status
from tests.ar1 import chains, codes, draws_of, rng

R = 400
ENOUGH = 357


def hits(est: Estimate, truth: float) -> int:
    return int(((est.interval[0] <= truth) & (truth <= est.interval[1])).sum())


# ---- coverage ----

SHAPES = [(256, 16, 3), (16, 40, 3), (64, 2, 3), (8, 100, 3), (4, 400, 3), (3, 400, 3), (1, 2000, 3), (200, 1, 1)]


@pytest.mark.parametrize(("m", "n", "tau"), SHAPES)
def test_mean_of_x_and_x2_and_a_probability_are_covered(m, n, tau):
    x = chains(m, n, tau)
    d = draws_of(x)
    assert hits(expectation(x, d), 0.0) >= ENOUGH
    assert hits(expectation(x.square(), d), 1.0) >= ENOUGH
    assert hits(probability(x > 1, d), 1 - special.ndtr(1.0)) >= ENOUGH


@pytest.mark.parametrize(("m", "n", "tau"), [(256, 16, 3), (16, 40, 3), (4, 400, 3), (1000, 1, 1)])
def test_sd_and_quantiles_are_covered(m, n, tau):
    x = chains(m, n, tau)
    d = draws_of(x)
    assert hits(sd(x, d), 1.0) >= ENOUGH
    for p in (0.05, 0.5):
        assert hits(quantile(x, p, d), special.ndtri(p)) >= ENOUGH


def test_stderr_is_the_spread_of_the_answers():
    """400 columns: sqrt(mean se^2) / sd of the values has a standard error of 4%; wrong by 20% is red, right is red with 1e-6."""
    x = chains(64, 16, 3)
    d = draws_of(x)
    for est in (expectation(x, d), sd(x, d), quantile(x, 0.3, d), probability(x > 1, d), expectation(x.square(), d)):
        assert 0.82 < float(est.stderr.square().mean().sqrt() / est.value.std()) < 1.2
        half = (est.interval[1] - est.interval[0]) / 2
        assert float((half / est.stderr).median()) == pytest.approx(1.99, abs=0.06)  # t of 63 degrees


def test_a_covariance_is_covered():
    x = chains(64, 16, 3, 2 * R)
    u, v = x[..., :R], 0.6 * x[..., :R] + 0.8 * x[..., R:]
    d = draws_of(x)
    inside, values, bars = 0, [], []
    for r in range(0, R, 4):  # all pairs of 8 columns at once, of which the 4 true pairs are read
        est = covariance(torch.cat([u[..., r : r + 4], v[..., r : r + 4]], -1), d)
        low, high = est.interval[0].diagonal(4), est.interval[1].diagonal(4)
        inside += int(((low <= 0.6) & (high >= 0.6)).sum())
        values.append(est.value.diagonal(4))
        bars.append(est.stderr.diagonal(4))
    assert inside >= ENOUGH
    assert 0.82 < float(torch.cat(bars).square().mean().sqrt() / torch.cat(values).std()) < 1.2


@pytest.mark.parametrize("n", [30, 200])
def test_independent_skewed_draws_are_covered(n):
    y = -torch.rand(n, 1, R, generator=rng(1), dtype=torch.float64).log()  # exponential: the t interval covers .926 at n = 30
    assert hits(expectation(y, draws_of(y)), 1.0) >= ENOUGH


def test_hall_beats_t_for_skewed_f():
    y = chains(20, 1, 1, 4000, seed=5).exp()
    est, truth = expectation(y, draws_of(y)), math.exp(0.5)
    t = ((est.value - truth).abs() <= stats.t.ppf(0.975, 19) * est.stderr).sum()
    assert hits(est, truth) > int(t) + 100


def test_the_rule_catches_a_bar_that_is_too_short():
    x = chains(256, 16, 3)
    est = expectation(x, draws_of(x))
    assert int((est.value.abs() <= stats.t.ppf(0.975, 255) * est.stderr / 1.5).sum()) < ENOUGH


# ---- exact answers ----


def test_between_chain_bar_is_the_t_interval_of_the_chain_means():
    x = chains(32, 5, 2, 1)[..., 0]
    est = expectation(x, draws_of(x))
    means = x.mean(1)
    assert float(est.stderr) == pytest.approx(float(means.std()) / math.sqrt(32), rel=1e-12)
    assert float(est.value) == pytest.approx(float(means.mean()), rel=1e-12)
    assert float(est.df) == 31
    assert float(est.ess) == pytest.approx(float(x.var() / est.stderr**2), rel=1e-9)
    symmetric = torch.cat([x, -x])  # no skewness: Hall's interval is Student's
    est = expectation(symmetric, draws_of(symmetric))
    low, high = stats.t.interval(0.95, 63, loc=0.0, scale=float(est.stderr))
    assert est.interval.tolist() == pytest.approx([low, high], rel=1e-9)


def test_independent_events_have_clopper_pearson_intervals():
    hit = torch.zeros(200, 1, dtype=torch.bool)
    hit[:37] = True
    est = probability(hit, draws_of(hit))
    exact = stats.binomtest(37, 200).proportion_ci(0.95, "exact")
    assert est.interval.tolist() == pytest.approx([exact.low, exact.high], abs=1e-9)
    assert est.status is Status.OK


def test_median_interval_of_independent_draws_is_the_binomial_one():
    y = torch.arange(1.0, 101.0, dtype=torch.float64)[torch.randperm(100, generator=rng())][:, None]
    est = quantile(y, 0.5, draws_of(y))
    assert est.interval.tolist() == [40.0, 61.0]  # Binomial(100, 1/2): 40 and 60 + 1
    assert float(est.value) == 50.0


def test_quantile_sides_the_draws_do_not_bound_are_infinite():
    y = torch.randn(60, 1, generator=rng(), dtype=torch.float64)
    est = quantile(y, 0.99, draws_of(y))
    assert est.interval[1] == math.inf and est.interval[0] > 0
    assert "EXTREME_QUANTILE" in codes(est) and est.status is not Status.OK


def test_sd_and_covariance_agree_with_numpy():
    x = chains(64, 8, 1, 2)
    x = torch.stack([x[..., 0], x[..., 0] + 2 * x[..., 1]], -1)
    est, spread = covariance(x, draws_of(x)), sd(x, draws_of(x))
    assert torch.allclose(est.value, x.flatten(0, 1).T.cov(), rtol=5e-3)
    assert torch.allclose(est.value, est.value.T) and est.stderr.shape == (2, 2)
    assert torch.allclose(spread.value.square(), est.value.diagonal(), rtol=1e-12)
    c = (x[..., 0] - x[..., 0].mean()).square()
    assert float(spread.ess[0]) == pytest.approx(float(expectation(c, draws_of(x)).ess), rel=1e-9)  # ESS of c^2, not of x


# ---- events that hardly ever happen ----


def test_no_hit_gives_the_rule_of_three():
    hit = torch.zeros(1000, 1, dtype=torch.bool)
    est = probability(hit, draws_of(hit))
    assert est.interval.tolist() == pytest.approx([0.0, 3e-3])
    assert float(est.stderr) == pytest.approx(3e-3)
    assert codes(est) == {"RARE_EVENT"} and est.status is Status.CAUTION
    always = probability(~hit, draws_of(hit))
    assert always.interval.tolist() == pytest.approx([0.997, 1.0])


def test_no_hit_in_chains_is_judged_by_the_ess_of_x():
    x = chains(64, 50, 5, 1)
    est = probability(x[..., 0] > 9, Draws(x, x[..., 0]))
    assert 3 / 3200 * 3 < float(est.interval[1]) < 3 / 3200 * 8
    assert "FEW_SWITCHES" in codes(est)  # unreachable and rare look the same from here


def test_few_hits_have_an_asymmetric_interval_that_covers():
    x = chains(256, 16, 3)
    truth = 1 - special.ndtr(2.9)
    est = probability(x > 2.9, draws_of(x))
    assert hits(est, truth) >= ENOUGH
    assert bool((est.interval[0] >= 0).all())
    assert "RARE_EVENT" in codes(est)


def test_the_interval_of_a_rare_event_counts_effective_draws():
    """Every draw stands ten times in a row: ten times as many hits, and not a narrower interval (counting draws: .35 of its width)."""
    x = torch.randn(64, 30, 100, generator=rng(3), dtype=torch.float64)
    single, repeated = (probability(y > 2.6, draws_of(y)) for y in (x, x.repeat_interleave(10, 1)))
    ratio = (repeated.interval[1] - repeated.interval[0]) / (single.interval[1] - single.interval[0])
    assert all("RARE_EVENT" in codes(e) for e in (single, repeated))
    assert 0.85 < float(ratio.median()) < 1.2


# ---- never a bar of zero ----


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 2), (2, 1), (2, 2), (1, 7), (3, 1), (3, 2)])
def test_almost_no_draws_run_and_say_so(m, n):
    x = chains(m, n, 1, 1)
    d = Draws(x, x[..., 0])
    y = x[..., 0]
    for est in (expectation(y, d), sd(y, d), probability(y > 0, d), quantile(y, 0.3, d), covariance(x, d)):
        assert est.status is not Status.OK
        assert not bool((est.stderr == 0).any())


@pytest.mark.parametrize("y", [torch.full((32, 10), 2.5), torch.full((32, 1), 2.5), torch.full((32, 10), 2.5, dtype=torch.float64)])
def test_a_constant_has_no_bar(y):
    est = expectation(y, draws_of(y))
    assert float(est.value) == 2.5
    assert est.stderr.isnan() and est.status is Status.CAUTION and codes(est) == {"CONSTANT_F"}
    assert sd(y, draws_of(y)).status is not Status.OK
    assert "CONSTANT_F" in codes(quantile(y, 0.5, draws_of(y)))


def test_chains_that_agree_to_the_last_digit_have_no_bar():
    y = torch.tensor([0.0, 1.0, 2.0]).repeat(32, 4)
    est = expectation(y, draws_of(y))
    assert est.stderr.isnan() and codes(est) >= {"NO_ERROR_BAR"} and est.status is Status.UNTRUSTED


# ---- invariances ----


@pytest.mark.parametrize(("a", "b"), [(0.0, 1e-8), (0.0, 1e8), (0.0, -3.0), (7.0, 1e-3), (1e9, 1.0), (0.0, 1e-200), (0.0, 1e200)])
def test_affine_invariance(a, b):
    x = chains(32, 20, 3, 3).exp()
    moved = a + b * x
    start = torch.randn(32, 3, generator=rng(3), dtype=torch.float64)
    one = expectation(x, draws_of(x), start)
    other = expectation(moved, draws_of(x), a + b * start)
    ends = other.interval if b > 0 else other.interval.flip(0)
    assert torch.allclose(other.stderr / abs(b), one.stderr, rtol=1e-6)
    assert torch.allclose((other.value - a) / b, one.value, rtol=1e-6)
    assert torch.allclose((ends - a) / b, one.interval, rtol=1e-6)
    assert torch.allclose(other.ess, one.ess, rtol=1e-6)
    assert [f.code for f in one.flags] == [f.code for f in other.flags]
    if abs(b) < 1e100:
        assert torch.allclose(sd(moved, draws_of(x)).value / abs(b), sd(x, draws_of(x)).value, rtol=1e-6)


def test_mean_far_above_sd_keeps_its_digits_and_float32_says_so():
    x = chains(64, 20, 1, 1)[..., 0]
    est = expectation(1e9 + x, draws_of(x))
    assert float(est.value) - 1e9 == pytest.approx(float(x.mean()), abs=1e-6)
    assert "COARSE_F" not in codes(est)
    coarse = expectation((1e9 + x).float(), draws_of(x))  # float32 has steps of 64 at 1e9
    assert coarse.status is not Status.OK
    assert "COARSE_F" in codes(expectation((1e7 + x).float(), draws_of(x)))  # steps of 1
    assert "COARSE_F" not in codes(expectation(x.float(), draws_of(x)))


def test_shapes_components_and_dtypes():
    x = chains(32, 10, 1, 6).reshape(32, 10, 2, 3)
    est = expectation(x, draws_of(x[..., 0]))
    assert est.value.shape == (2, 3) and est.interval.shape == (2, 2, 3) and est.value.dtype == torch.float64
    half = expectation(x.half(), draws_of(x[..., 0]))
    assert torch.allclose(half.value, est.value, atol=1e-3)
    row = expectation(x[..., 0, :], draws_of(x[..., 0, 0]))
    assert torch.allclose(row[1].value, est.value[0, 1]) and row[1].interval.shape == (2,)
    with pytest.raises(ShapeError):
        expectation(x[:5], draws_of(x[..., 0]))
    with pytest.raises(ShapeError):
        covariance(x, draws_of(x[..., 0]))
    with pytest.raises(ValueError, match="between 0 and 1"):
        quantile(x, 1.0, draws_of(x[..., 0]))
    with pytest.raises(ValueError, match="event"):
        probability(x, draws_of(x[..., 0]))


def test_the_users_default_device_and_dtype_do_not_matter():
    x = chains(64, 20, 1, 2)
    d, start = Draws(x, x[..., 0], group=torch.arange(64) // 8), torch.randn(64, 2, generator=rng())
    asked = [lambda f=f: f(x, d) for f in (sd, covariance)]
    asked += [lambda: expectation(x, d, start), lambda: quantile(x, 0.2, d), lambda: probability(x > 3, d)]
    asked += [lambda: replace(sd(x, d), flags=doubtful_tails(x, d, torch.tensor([90.0, 900.0], dtype=torch.float64, device="cpu")))]
    before = [f() for f in asked]
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        after = [f() for f in asked]
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a.value, b.value) and torch.equal(a.interval, b.interval) and codes(a) == codes(b)


def test_a_nan_is_located_and_spares_the_other_components():
    x = chains(32, 20, 1, 3)
    x[4, 3, 1] = math.nan
    for est in (expectation(x, draws_of(x)), sd(x, draws_of(x)), quantile(x, 0.5, draws_of(x))):
        assert est.value[1].isnan() and est.value[[0, 2]].isfinite().all()
        assert est[1].status is Status.UNTRUSTED and "NONFINITE_F" in codes(est[1])
        assert "NONFINITE_F" not in codes(est[0])
    matrix = covariance(x, draws_of(x)).value
    assert matrix[1].isnan().all() and matrix[0, 0].isfinite() and matrix[0, 2].isfinite()


def test_flags_and_witnesses_of_the_draws_are_kept():
    from dataclasses import replace

    from boltzsample.flags import flag

    x = chains(32, 20, 1, 1)
    d = replace(Draws(x, x[..., 0]), flags=(flag("SINGLE_WITNESS"),), witnesses=("a look",))
    for est in (expectation(x, d), sd(x, d), quantile(x, 0.5, d), covariance(x, d), probability(x > 0, d)):
        assert "SINGLE_WITNESS" in codes(est) and est.witnesses == ("a look",)
