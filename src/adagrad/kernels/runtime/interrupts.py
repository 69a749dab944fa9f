"""Interrupts such as Ctrl-C: Python notices them only after compiled code has done its work, which then counts."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any


def uninterrupted(function: Callable[[], Any]) -> Any:
    """Return ``function()``; an exception of a signal handler is raised when it is done.

    Importing or compiling half of something would break Numba for the rest of the process. Handlers run in the main
    thread only, so the function runs in another one.
    """
    if threading.current_thread() is not threading.main_thread() or sys.is_finalizing():
        return function()
    outcome: list[tuple[Any, BaseException | None]] = []
    done = threading.Event()

    def run() -> None:
        try:
            outcome.append((function(), None))
        except BaseException as error:
            outcome.append((None, error))
        finally:
            done.set()

    try:
        threading.Thread(target=run).start()
    except RuntimeError:  # there is no memory for a thread
        return function()
    interrupt: BaseException | None = None
    while not done.is_set():
        try:
            done.wait()  # joining the thread would not do: before Python 3.13, an interrupted join loses it
        except BaseException as late:
            interrupt = late
    result, error = outcome[0]
    if interrupt is not None or error is not None:
        raise interrupt or error  # type: ignore[misc]
    return result


def mark_late(interrupt: BaseException) -> None:
    """Mark an interrupt as noticed only after the work was done."""
    _mark(interrupt, True)


def came_late(interrupt: BaseException) -> bool:
    """Whether an interrupt was noticed only after the work was done. To be asked once, by the caller that counts it.

    The mark is removed: the next interrupt may be the same object, and come before the work is done.
    """
    is_late: bool = getattr(interrupt, "came_late", False)
    if is_late:
        _mark(interrupt, False)
    return is_late


def _mark(interrupt: BaseException, late: bool) -> None:
    with suppress(Exception):  # of a class that refuses attributes
        interrupt.came_late = late  # type: ignore[attr-defined]
