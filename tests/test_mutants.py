"""The planted errors of benchmarks/mutants.py still fit the code, and the quickest are caught (all: `python -m benchmarks mutants`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.mutants import MUTANTS, ROOT, Mutant, apply, copy_tree, first_red, known_reds, trials


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_every_mutant_still_fits(mutant: Mutant) -> None:
    assert apply(mutant) != (ROOT / mutant.path).read_text()
    assert all((ROOT / test.split("::")[0]).exists() for test in mutant.tests)


def test_names_are_unique() -> None:
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)


def test_a_text_that_moved_is_an_error() -> None:
    with pytest.raises(ValueError, match="occurs 0 times"):
        Mutant("gone", "views.py", "no such line", "").applied("x = 1")


def test_a_mutant_is_caught_and_its_tree_restored(tmp_path: Path) -> None:
    copy_tree(tmp_path)
    chosen = next(m for m in MUTANTS if m.name == "coin: NaN accepted")
    before = (tmp_path / chosen.path).read_text()
    coin = Mutant(chosen.name, chosen.file, chosen.old, chosen.new, ("tests/test_kernels.py::test_the_coin",))
    ((_, red, _),) = trials([coin], tmp_path, {coin.name: "tests/test_kernels.py::one_that_is_gone"})
    assert red == "test_kernels.py::test_the_coin"
    assert (tmp_path / chosen.path).read_text() == before
    assert first_red(coin.tests, tmp_path) is None
    with pytest.raises(LookupError, match="one_that_is_gone"):
        first_red(("tests/test_kernels.py::one_that_is_gone",), tmp_path)


def test_the_table_of_a_run_says_what_to_try_first(tmp_path: Path) -> None:
    table = tmp_path / "mutants.md"
    rows = "| a: b | test_x.py::test_y[1-2] | 3 |\n| c | **none: it survived** | 9 |\n"
    table.write_text("| mutant | test that went red | s |\n|---|---|---|\n" + rows)
    assert known_reds(table, tmp_path / "missing.md") == {"a: b": "tests/test_x.py::test_y[1-2]"}
