"""What a run says while it runs, and how it is asked to stop. No torch here: neither may cost the sampler anything."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self, SupportsFloat

Reading = SupportsFloat | Callable[[], SupportsFloat] | None


class Progress:
    """A progress bar per phase on stderr, with acceptance, nested R-hat so far and evaluations per second.

    `enabled=None` shows bars only where stderr is a terminal. Readings may be numbers, tensors or functions without
    arguments: they are looked at only when the bar is redrawn, at most every `interval` seconds.

    >>> progress = Progress(enabled=False)
    >>> with progress.phase("sampling", total_steps=100):
    ...     for _ in range(10):
    ...         progress.update(10, acceptance=0.8, evaluations=lambda: 12_800)
    """

    def __init__(self, enabled: bool | None = None, interval: float = 0.2) -> None:
        self.enabled = (sys.stderr is not None and sys.stderr.isatty()) if enabled is None else enabled
        self.interval = interval
        self._bars: list[_Bar] = []

    @contextmanager
    def phase(self, name: str, total_steps: int | None = None) -> Iterator[Progress]:
        """A bar of its own for the steps inside the `with`; phases may be nested."""
        if not self.enabled:
            yield self
            return
        self._bars.append(_Bar(name, total_steps, self.interval, leave=not self._bars))
        try:
            yield self
        finally:
            self._bars.pop().close()

    def update(
        self, steps: int = 1, *, acceptance: Reading = None, stationarity: Reading = None, evaluations: Reading = None, **more: Reading
    ) -> None:
        """`steps` more are done. `stationarity` is nested R-hat so far; `evaluations` is the run's total so far, not an increment.
        `more` are shown by their own names, such as elbo=."""
        if self._bars:
            self._bars[-1].update(steps, acceptance, stationarity, evaluations, more)


class _Bar:
    """One tqdm bar and the readings behind it."""

    def __init__(self, name: str, total: int | None, interval: float, leave: bool) -> None:
        from tqdm import tqdm

        class Bar(tqdm):  # type: ignore[misc]
            monitor_interval = 0  # no monitor thread left behind

        self.bar: Any = Bar(total=total, desc=name, leave=leave, unit="step", miniters=1, mininterval=interval, dynamic_ncols=True)
        self.interval, self.last = interval, -float("inf")
        self.spent: tuple[float, float] | None = None  # (evaluations, time) at the first reading

    def update(self, steps: int, acceptance: Reading, stationarity: Reading, evaluations: Reading, more: dict[str, Reading]) -> None:
        now = time.monotonic()
        if now - self.last >= self.interval:
            self.last = now
            texts = _text(acceptance, "{:.2f}"), _text(stationarity, "{:.3f}"), self._rate(evaluations, now)
            shown = {name.replace("_", " "): _text(reading, "{:.4g}") for name, reading in more.items()}
            shown |= dict(zip(("accept", "nested R-hat", "eval/s"), texts, strict=True))
            self.bar.set_postfix({k: v for k, v in shown.items() if v}, refresh=False)
        self.bar.update(steps)

    def _rate(self, evaluations: Reading, now: float) -> str:
        spent = _value(evaluations)
        if spent is None:
            return ""
        if self.spent is None:
            self.spent = spent, now
        first, began = self.spent
        return f"{(spent - first) / (now - began):,.0f}" if now > began else ""

    def close(self) -> None:
        self.bar.close()


def _value(reading: Reading) -> float | None:
    value = reading() if callable(reading) else reading
    return None if value is None else float(value)


def _text(reading: Reading, form: str) -> str:
    value = _value(reading)
    return "" if value is None else form.format(value)


class Interrupt:
    """While entered, in the main thread: the first Ctrl-C (or SIGTERM) sets `requested`, the second raises KeyboardInterrupt at once.

    Old handlers are restored on exit. Off the main thread nothing is installed, and a signal that is being ignored
    (nohup, a background job of the shell) stays ignored.

    >>> with Interrupt() as interrupt:
    ...     interrupt.requested
    False
    """

    def __init__(self) -> None:
        self.requested = False
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for s in (signal.SIGINT, signal.SIGTERM):
                old = signal.getsignal(s)
                if old not in (None, signal.SIG_IGN):  # None: installed outside Python, could not be put back
                    self._old[s] = signal.signal(s, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._old:
            signal.signal(*self._old.popitem())

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        os.write(2, b"\nstopping after this step; what is there will be returned (once more to stop at once)\n")  # print is not reentrant
