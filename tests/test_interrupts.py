"""Imports and compilations that are not interrupted halfway."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from adagrad.kernels.runtime.interrupts import uninterrupted


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no timers that signal")
@pytest.mark.parametrize("kind", [InterruptedError, KeyboardInterrupt])
@pytest.mark.parametrize("fails", [False, True])
def test_an_interrupt_waits_until_an_import_or_a_compilation_is_complete(
    kind: type[BaseException], fails: bool
) -> None:
    """Interrupted halfway, Numba's modules and registries are broken for the rest of the process."""
    done = []

    def work() -> None:
        time.sleep(0.2)
        done.append(True)
        if fails:
            raise ZeroDivisionError

    def interrupt(*_: object) -> None:
        raise kind

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(kind):
            uninterrupted(work)
        assert done == [True]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        time.sleep(0.3)


@pytest.mark.parametrize("kind", [ZeroDivisionError, SystemExit])
def test_what_an_import_or_a_compilation_raises_is_raised(kind: type[BaseException]) -> None:
    def work() -> None:
        raise kind

    with pytest.raises(kind):
        uninterrupted(work)
    assert uninterrupted(lambda: "result") == "result"


def test_without_a_new_thread_the_work_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert uninterrupted(lambda: threading.current_thread() is threading.main_thread())
