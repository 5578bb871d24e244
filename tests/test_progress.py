"""Progress bars and interrupts (fault 43)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from boltzsample.progress import Interrupt, Progress


def test_a_bar_shows_its_readings(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(enabled=True, interval=0.0)
    with progress.phase("sampling", total_steps=4):
        for i in range(4):
            time.sleep(0.01)
            progress.update(acceptance=torch.tensor(0.8123), stationarity=lambda: 1.0042, evaluations=1000 * (i + 1))
    shown = capsys.readouterr().err.rpartition("\r")[2]
    assert "sampling: 100%" in shown and "4/4" in shown and "accept=0.81" in shown and "nested R-hat=1.004" in shown
    rate = float(shown.partition("eval/s=")[2].partition("]")[0].replace(",", ""))
    assert 20_000 < rate <= 100_000  # 1000 every 10 ms or slower


def test_readings_are_looked_at_rarely(capsys: pytest.CaptureFixture[str]) -> None:
    looks = []
    progress = Progress(enabled=True, interval=60.0)
    with progress.phase("sampling", total_steps=1000):
        for _ in range(1000):
            progress.update(acceptance=lambda: looks.append(1) or 0.5)  # type: ignore[func-returns-value]
    assert len(looks) == 1
    assert capsys.readouterr().err.count("\r") < 5


def test_silence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> float:
        raise AssertionError("nobody looks")

    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    for progress in (Progress(False), Progress(None)):
        with progress.phase("a", 3):
            progress.update(acceptance=never, evaluations=never)
        progress.update(3)  # outside any phase
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert Progress(None).enabled
    monkeypatch.setattr(sys, "stderr", None)
    assert not Progress(None).enabled


def test_phases_nest_and_close_when_a_density_raises(capsys: pytest.CaptureFixture[str]) -> None:
    before = set(threading.enumerate())
    progress = Progress(enabled=True)
    with pytest.raises(ZeroDivisionError), progress.phase("outer", 2), progress.phase("inner"):
        raise ZeroDivisionError
    progress.update(1)
    with progress.phase("next", 1):
        progress.update(1)
    err = capsys.readouterr().err
    assert "outer" in err and "inner" in err and "next: 100%" in err
    assert set(threading.enumerate()) <= before  # no monitor thread of tqdm's is left behind


def test_a_terminal_less_run_does_not_import_tqdm() -> None:
    code = "from boltzsample.progress import Progress\nwith Progress(False).phase('a', 1): pass"
    check = "import sys\nassert not {'tqdm', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"{code}\n{check}"], check=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_asks_second_stops(number: signal.Signals) -> None:
    old = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), number)
        assert interrupt.requested
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert {s: signal.getsignal(s) for s in old} == old


def test_handlers_are_restored_and_nest() -> None:
    old = signal.getsignal(signal.SIGINT)
    with Interrupt() as outer:
        with Interrupt() as inner:
            os.kill(os.getpid(), signal.SIGINT)
        assert inner.requested and not outer.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert outer.requested
    assert signal.getsignal(signal.SIGINT) is old
    assert not Interrupt().requested  # never entered: never asked


def test_off_the_main_thread_nothing_is_installed() -> None:
    old, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with Interrupt() as interrupt:
            seen.append(signal.getsignal(signal.SIGINT) is old and not interrupt.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]


def test_an_ignored_signal_stays_ignored() -> None:
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            assert not interrupt.requested
    finally:
        signal.signal(signal.SIGINT, old)
