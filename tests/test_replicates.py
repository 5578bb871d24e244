"""Replicates: the interval of their mean, the test of their bars, and how their flags speak for the whole."""

import math
from dataclasses import replace

import pytest
import torch
from scipy import stats

from boltzsample.draws import Draws, Estimate
from boltzsample.errors import ShapeError
from boltzsample.estimates import combine, expectation, probability
from boltzsample.estimates.evidence import combine_log_z
from boltzsample.flags import Flag, Status, flag
from tests.ar1 import chains, codes, draws_of, rng


def number(value: float, stderr: float = 1.0, flags: tuple[Flag, ...] = (), df: float = 255.0) -> Estimate:
    v, s = torch.tensor(value).double(), torch.tensor(stderr).double()
    return Estimate(
        v, s, torch.tensor(df).double(), torch.stack([v - 2 * s, v + 2 * s]), torch.tensor(1000.0).double(), "made up", (), flags
    )


def normal(r: int, spread: float = 1.0, seed: int = 0, flagged: dict[int, tuple[Flag, ...]] | None = None) -> list[Estimate]:
    values = spread * torch.randn(r, generator=rng(seed), dtype=torch.float64)
    return [number(float(v), 1.0, (flagged or {}).get(i, ())) for i, v in enumerate(values)]


def test_the_interval_is_students():
    runs = normal(5)
    e = torch.stack([r.value for r in runs])
    est = combine(runs)
    low, high = stats.t.interval(0.95, 4, loc=float(e.mean()), scale=float(e.std()) / math.sqrt(5))  # t, not z, at R = 5
    assert est.interval.tolist() == pytest.approx([low, high], rel=1e-9)
    assert float(est.stderr) == pytest.approx(float(e.std()) / math.sqrt(5)) and float(est.df) == 4
    assert est.method == "mean of 5 replicates" and est.status is Status.OK


def test_coverage_of_the_combination():
    """400 groups of 4 runs, as columns: red at 356 or fewer, by chance with probability 1.4e-6."""
    runs = []
    for seed in range(4):
        x = chains(20, 5, 3, 400, seed)
        runs.append(expectation(x.square(), draws_of(x)))
    est = combine(runs)
    assert int(((est.interval[0] <= 1) & (est.interval[1] >= 1)).sum()) >= 357


def test_one_is_itself_and_none_is_an_error():
    one = number(1.0)
    assert combine([one]) is one and combine_log_z([one]) is one
    for f in (combine, combine_log_z):
        with pytest.raises(ValueError, match="no replicates"):
            f([])
    x = chains(20, 5, 1, 3)
    with pytest.raises(ShapeError):
        combine([expectation(x, draws_of(x)), expectation(x[..., 0], draws_of(x))])


def test_bars_that_are_too_short_are_found():
    assert "SE_MISCALIBRATED" not in codes(combine(normal(20)))
    est = combine(normal(20, spread=3.0))
    assert "SE_MISCALIBRATED" in codes(est) and est.status is Status.CAUTION
    assert float(est.stderr) > 0.4  # the spread of the replicates is what is reported
    lax = [replace(e, df=torch.tensor(2.0).double()) for e in normal(4, spread=2.5)]  # bars of 2 degrees excuse much
    assert "SE_MISCALIBRATED" not in codes(combine(lax))


def test_the_test_of_bars_seldom_errs():
    """2000 components at once: under Holm the whole family errs with probability .001; the uncorrected F at .001 a few times."""
    x = chains(16, 8, 2, 2000 * 5)
    runs = [expectation(x[..., r * 2000 : (r + 1) * 2000], draws_of(x)) for r in range(5)]
    assert "SE_MISCALIBRATED" not in codes(combine(runs))


def test_a_zero_spread_has_no_bar():
    est = combine([number(1.5)] * 6)
    assert est.stderr.isnan() and "NO_ERROR_BAR" in codes(est) and est.status is Status.UNTRUSTED


@pytest.mark.parametrize("code", ["WITNESS_CONFLICT", "STUCK_CHAIN", "FEW_SWITCHES", "NONFINITE_F", "INTERRUPTED", "REPLICATE_FAILED"])
def test_a_conflict_in_one_replicate_speaks_for_the_whole(code):
    est = combine(normal(20, flagged={7: (flag(code),)}))
    assert est.status is Status.UNTRUSTED
    assert next(f for f in est.flags if f.code == code).detail.startswith("1 of 20 replicates")


def test_tests_at_one_in_a_thousand_need_more_than_chance():
    drift = (flag("DRIFT", value=4.0, threshold=3.3),)
    once = combine(normal(20, flagged={3: drift}))
    assert once.status is Status.OK and "DRIFT" in codes(once)  # still told, as info
    assert combine(normal(20, flagged={3: drift, 9: drift})).status is Status.UNTRUSTED
    assert combine(normal(2, flagged={0: drift})).status is Status.CAUTION
    assert combine(normal(2, flagged={0: drift, 1: drift})).status is Status.UNTRUSTED


def test_a_property_of_f_is_decided_by_most_replicates():
    heavy = (flag("HEAVY_F", value=0.55, threshold=0.5),)
    assert combine(normal(9, flagged={i: heavy for i in range(4)})).status is Status.OK
    assert combine(normal(9, flagged={i: heavy for i in range(5)})).status is Status.UNTRUSTED
    doubtful = (replace(heavy[0], severity="caution"),)
    assert combine(normal(9, flagged={0: heavy} | {i: doubtful for i in range(1, 6)})).status is Status.CAUTION
    refused = [*normal(8), number(math.nan, math.nan, (flag("HEAVY_F", value=1.2, threshold=1.0),))]
    assert combine(refused).status is Status.UNTRUSTED


def test_too_few_draws_in_each_may_be_enough_in_all():
    x = [chains(16, 10, 4, 1, seed)[..., 0] for seed in range(20)]
    runs = [expectation(v, draws_of(v)) for v in x]
    assert all(r.status is Status.UNTRUSTED for r in runs)  # ESS 40 each
    est = combine(runs)
    assert est.status is Status.OK and "ESS_LOW" in codes(est)
    assert combine(runs[:5]).status is Status.CAUTION
    rare = [probability(v > 2, draws_of(v)) for v in x]
    assert all("RARE_EVENT" in codes(r) for r in rare)
    single = [replace(r, flags=(flag("ONE_UNIT"),)) for r in normal(20)]
    assert combine(single).status is Status.OK and combine(single[:8]).status is Status.CAUTION
    assert combine(single[:3]).status is Status.UNTRUSTED


def test_components_keep_their_own_flags():
    runs = []
    for seed in range(6):
        x = chains(32, 20, 1, 3, seed)
        x[0, 0, 1] = math.nan if seed == 2 else x[0, 0, 1]
        runs.append(expectation(x, draws_of(x)))
    est = combine(runs)
    assert "NONFINITE_F" in codes(est[1]) and est.value[1].isnan()
    assert est[0].status is Status.OK and est[2].status is Status.OK and est.value[[0, 2]].isfinite().all()


def test_witnesses_are_gathered():
    x = chains(32, 20, 1, 1)[..., 0]
    runs = [expectation(v, Draws(v[..., None], v, witnesses=(w,))) for v, w in ((x, "a"), (x + 0.01, "b"))]
    assert combine(runs).witnesses == ("a", "b")


def test_log_z_is_the_log_of_the_mean():
    """Finding 4 of TRUST: the mean of logs covers .27, this .92. Zhat_r lognormal of unit mean, log variance 1/4."""
    inside, naive = 0, 0
    logs = 0.5 * torch.randn(400, 100, generator=rng(3), dtype=torch.float64) - 0.125
    for row in logs:
        est = combine_log_z([number(float(v)) for v in row])
        inside += bool(est.interval[0] <= 0 <= est.interval[1])
        naive += abs(float(row.mean())) <= 1.984 * float(row.std()) / 10
    assert inside >= 357 > naive
    assert float(logs[0].min()) - math.log(20) / 100 == pytest.approx(
        float(combine_log_z([number(float(v)) for v in logs[0]]).method.split(">=")[1].split()[0]), rel=1e-3
    )
    lost = combine_log_z([number(0.1), number(math.nan, flags=(flag("NO_LOG_Z"),))])
    assert lost.value.isnan() and lost.status is Status.UNTRUSTED


def test_bars_of_log_z_are_held_against_the_spread():
    """Spread .1: with bars of .1, 2 of 2,000 are flagged at p < 1e-3 (7 or more in one such test of 220); with bars of .03, all."""
    each = 0.1 * torch.randn(2_000, 16, generator=rng(5), dtype=torch.float64)
    kept = [combine_log_z([number(float(v), 0.1) for v in row]) for row in each]
    assert sum("SE_MISCALIBRATED" in codes(e) for e in kept) < 7
    short = [combine_log_z([number(float(v), 0.03) for v in row]) for row in each[:50]]
    assert all(e.status is Status.CAUTION and "SE_MISCALIBRATED" in codes(e) for e in short)
    assert all(float(e.stderr) == pytest.approx(float(k.stderr)) for e, k in zip(short, kept, strict=False))  # the spread, either way


def test_log_z_of_four_replicates_is_students():
    """Three degrees of freedom: 3.18 standard errors, not 1.96."""
    est = combine_log_z([number(v) for v in (0.1, -0.2, 0.05, 0.0)])
    low, high = est.interval.tolist()
    assert (high - low) / (2 * float(est.stderr)) == pytest.approx(stats.t.ppf(0.975, 3), rel=1e-9) and float(est.df) == 3
