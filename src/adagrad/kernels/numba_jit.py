"""Every Numba option of the library in one place: compilation, the cache on disk, threads.

No fastmath, and ``error_model="numpy"``: the operations stay IEEE 754's, each rounded, and without Python's check for
a division by zero LLVM vectorises the loops.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator

F = TypeVar("F", bound=Callable[..., Any])


def jit(*, parallel: bool = False, helper: bool = False) -> Callable[[F], F]:
    """Decorator: compile at the first call with new argument types, and keep the machine code for the next process.

    A ``helper`` is called by other kernels alone: it is compiled into them, so that what is the same for all of its
    calls is computed once, and it needs no file of its own.
    """

    def compile_lazily(function: F) -> F:
        dispatcher = numba.jit(
            nopython=True,
            nogil=True,
            error_model="numpy",
            fastmath=False,
            boundscheck=False,
            parallel=parallel,
            forceinline=helper,
        )(function)
        if not helper:
            with suppress(Exception):  # no cache is slower, not wrong
                dispatcher._cache = _Cache(function)
        return cast(F, dispatcher)

    return compile_lazily


# ------------------------------------------------------------------------------------------------ the cache on disk


class _Locator(_CacheLocator):  # type: ignore[misc]
    """Where a kernel's machine code is kept, and what makes it stale: a change in any source file of the kernels.

    Numba's own cache looks at the file of the decorated function alone, so it would miss an edit in a helper's file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def get_cache_path(self) -> str:
        return str(self._path)

    def get_source_stamp(self) -> str:
        return _source_hash()

    def get_disambiguator(self) -> str:
        return ""

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], py_file: str) -> _Locator | None:
        path = cache_folder()
        return None if path is None else cls(path)


class _CacheImpl(CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = (_Locator,)


class _Cache(FunctionCache):  # type: ignore[misc]
    """Numba's disk cache; whatever goes wrong with it (a full disk, a damaged file) costs a compilation, no more."""

    _impl_class = _CacheImpl

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(Exception):
            super().save_overload(sig, data)


@functools.cache
def _source_hash() -> str:
    digest = hashlib.sha256(f"{sys.version} {numba.__version__}".encode())
    here = Path(__file__).parent
    for source in [*sorted(here.glob("*.py")), here.parent / "rule.py"]:
        if not source.name.startswith("cuda"):  # Triton's, which has a cache of its own
            digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def cache_folder() -> Path | None:
    """The folder of the compiled kernels, or None where there is none to be had.

    ``ADAGRAD_CACHE_DIR``, else Numba's ``NUMBA_CACHE_DIR``, else the user's cache folder. It holds pickles and machine
    code, so one that another user could write to is not used.
    """
    chosen = os.environ.get("ADAGRAD_CACHE_DIR") or os.environ.get("NUMBA_CACHE_DIR")
    try:
        root = Path(chosen) if chosen else _user_cache() / "adagrad"
        path = root.absolute() / f"kernels-{_source_hash()}"
        with suppress(OSError):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path if path.is_dir() and _private(path) else None
    except (OSError, RuntimeError):
        return None


def _user_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _private(path: Path) -> bool:
    """Whether only this user (or root) can replace files in ``path``."""
    if not hasattr(os, "getuid"):
        return True
    status = path.stat()
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


# ------------------------------------------------------------------------------------------------------------ threads

_lock = threading.Lock()
_forked = False


def _after_fork_in_child() -> None:
    # GNU OpenMP's threads do not survive a fork: a parallel kernel would kill the child. The serial ones still work.
    global _lock, _forked
    _lock, _forked = threading.Lock(), True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


@contextmanager
def workers(wanted: int) -> Iterator[int]:
    """How many workers a launch may have now, at most ``wanted``; the parallel layer is held while it is more than one.

    One, where another thread is in a parallel kernel (Numba's workqueue layer ends the process when two enter), or
    in a forked child. The results do not depend on it.
    """
    if wanted < 2 or _forked or not _lock.acquire(blocking=False):
        yield 1
        return
    try:
        yield wanted
    finally:
        _lock.release()


def max_workers() -> int:
    """The number of threads that Numba may use: ``NUMBA_NUM_THREADS``, ``numba.set_num_threads``, or all cores."""
    return int(numba.get_num_threads())
