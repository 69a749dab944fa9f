"""Whether a device could mix up what the programs of a launch read and write.

Triton's interpreter runs the programs of a launch one after the other, each operation as a whole. A device runs
programs at once and in any order, and the warps of a program at their own pace. So that this changes nothing, no byte
may be written twice in a launch, or be read by another program than the one that writes it, or by that one afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

UNIT = 2
"""Bytes that are told apart: no element is smaller."""


class Access(NamedTuple):
    pointers: np.ndarray
    size: int
    program: tuple[int, ...]
    time: int


class Launch:
    """The accesses of a launch."""

    def __init__(self) -> None:
        self.reads: list[Access] = []
        self.writes: list[Access] = []
        self.atomics: list[Access] = []
        self._programs: dict[tuple[int, ...], int] = {}

    def add(self, to: list[Access], pointers: np.ndarray, mask: np.ndarray, size: int, program: Any) -> None:
        time = len(self.reads) + len(self.writes) + len(self.atomics)
        to.append(Access(pointers[mask.astype(bool)], size, tuple(program), time))

    def _units(self, accesses: list[Access]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The units accessed in ascending order, by which program, and when."""
        units, programs, times = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for pointers, size, program, time in accesses:
            found = (pointers.astype(np.int64).ravel()[:, None] // UNIT + np.arange(size // UNIT)).ravel()
            units.append(found)
            programs.append(np.full(len(found), self._programs.setdefault(program, len(self._programs))))
            times.append(np.full(len(found), time))
        unit = np.concatenate(units)
        order = np.argsort(unit, kind="stable")
        return unit[order], np.concatenate(programs)[order], np.concatenate(times)[order]

    def races(self) -> list[str]:
        """What a device could mix up."""
        written, writer, when = self._units(self.writes)
        read, reader, then = self._units(self.reads)
        changed, _, _ = self._units(self.atomics)
        found = []
        if (written[1:] == written[:-1]).any():
            found.append("written twice")
        at = np.searchsorted(written, read)
        hit = at < len(written)
        hit[hit] = written[at[hit]] == read[hit]
        if (reader[hit] != writer[at[hit]]).any():
            found.append("read by one program and written by another")
        if ((reader[hit] == writer[at[hit]]) & (then[hit] > when[at[hit]])).any():
            found.append("written and then read")
        if np.isin(changed, np.concatenate([written, read])).any():
            found.append("changed atomically and otherwise")
        return found


class _Watched:
    """The interpreter's memory, watched."""

    def __init__(self, real: Any, launch: Callable[[], Launch], program: Callable[[], Any]) -> None:
        self._real, self._launch, self._program = real, launch, program

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        launch = self._launch()
        launch.add(launch.reads, pointers, mask, np.dtype(dtype).itemsize, self._program())
        return self._real.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, values: Any, mask: Any) -> Any:
        launch = self._launch()
        launch.add(launch.writes, pointers, mask, values.dtype.itemsize, self._program())
        return self._real.store(pointers, values, mask)

    def atomic_rmw(self, operation: Any, pointers: Any, values: Any, mask: Any, semantics: Any) -> Any:
        launch = self._launch()
        launch.add(launch.atomics, pointers, mask, values.dtype.itemsize, self._program())
        return self._real.atomic_rmw(operation, pointers, values, mask, semantics)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """From now on, each launch in the interpreter adds its name and :meth:`Launch.races` to the list returned."""
    from triton.runtime import interpreter

    seen: list[tuple[str, list[str]]] = []
    launches = [Launch()]
    real = interpreter.GridExecutor.__call__

    def run(self: Any, *arguments: Any, **options: Any) -> None:
        launches[:] = [Launch()]
        real(self, *arguments, **options)
        seen.append((self.fn.__name__, launches[0].races()))

    memory = _Watched(interpreter._interpreter, lambda: launches[0], lambda: interpreter.interpreter_builder.grid_idx)
    monkeypatch.setattr(interpreter, "_interpreter", memory)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run)
    return seen
