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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile, _CacheLocator
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

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

    def rebuild(self, target_context: Any, payload: Any) -> Any:
        compiled = super().rebuild(target_context, payload)
        # Numba forgets this of a loaded function. What calls it, and is compiled in this process, would be saved
        # without knowing that it needs the parallel layer, and the process that loads it would call address 0.
        compiled.library._reload_init.update(compiled.reload_init)
        return compiled


class _Files(IndexDataCacheFile):  # type: ignore[misc]
    """A file for each signature of a function, named after it.

    Numba numbers the files and keeps an index, which two processes that save two signatures at once can corrupt: both
    take the same number, and the index then leads to the code of the other.
    """

    def __init__(self, folder: str, function: str, stamp: str) -> None:
        super().__init__(folder, function, stamp)
        self._function = function

    def _file(self, key: object) -> str:
        return f"{self._function}.{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.nbc"

    def save(self, key: object, data: object) -> None:
        self._save_data(self._file(key), data)

    def load(self, key: object) -> Any:
        return self._load_data(self._file(key))

    def flush(self) -> None:
        """There is no index to empty."""


class _Cache(FunctionCache):  # type: ignore[misc]
    """Numba's disk cache; whatever goes wrong with it (a full disk, a damaged file) costs a compilation, no more."""

    _impl_class = _CacheImpl

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = _Files(self._cache_path, self._impl.filename_base, _source_hash())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # a missing file is the usual one
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
    if status.st_uid not in (os.getuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return False
    # Nor may anyone put another folder in the place of this one; a sticky folder, as /tmp is, allows no such thing.
    above = [folder.stat().st_mode for folder in path.resolve().parents]
    return all(not mode & stat.S_IWOTH or mode & stat.S_ISVTX for mode in above)


# -------------------------------------------------------------------------------------------------------- compilation

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": False, "boundscheck": False}


def jit(*, parallel: bool = False, helper: bool = False, holds_gil: bool = False) -> Callable[[F], F]:
    """Decorator: compile at the first call with new argument types, and keep the machine code for the next process.

    A ``helper`` is called by other kernels alone: it is compiled into them, so that what is the same for all of its
    calls is computed once, and it needs no file of its own. What looks into Python's objects ``holds_gil``.
    """

    def compile_lazily(function: F) -> F:
        options = {**_OPTIONS, "parallel": parallel, "forceinline": helper, "nogil": not holds_gil}
        dispatcher = numba.jit(nopython=True, **options)(function)
        if not helper:
            with suppress(Exception):  # no cache is slower, not wrong
                dispatcher._cache = _Cache(function)
        return cast(F, dispatcher)

    return compile_lazily


# ------------------------------------------------------------------------------------------------------------ workers
#
# What several threads do is compiled once, as a C function `work(arguments, k, count)` that does the k-th of count
# parts; one serial and one parallel driver call it by address. Else every kernel would be compiled into two drivers,
# and again for each of Numba's layers around a parallel loop: a minute instead of seconds.


def worker(function: Callable[[Any, Any, Any], None]) -> int:
    """Compile ``function(arguments, k, count)`` and give its address; ``arguments`` is that of an int64 array."""
    void, word = numba.types.void, numba.types.int64
    options = {"nopython": True, **_OPTIONS}
    compiled: Any = CFunc(function, numba.core.sigutils.normalize_signature(void(word, word, word)), {}, options)
    with suppress(Exception):
        compiled._cache = _Cache(function)
    compiled.compile()
    _workers.append(compiled)  # its machine code lives as long as it does
    return int(compiled.address)


_workers: list[Any] = []


def _call_code(typing: Any, work: Any, arguments: Any, k: Any, count: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [word, word, word])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    word = numba.types.int64
    return numba.types.void(word, word, word, word), generate


call: Any = intrinsic(_call_code)
"""Call the worker at an address: ``call(work, arguments, k, count)``."""


def _place_code(typing: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return numba.types.voidptr(numba.types.int64), generate


place: Any = intrinsic(_place_code)
"""The address as a pointer, for ``numba.carray``."""


def _release_gil_code(typing: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.ptrtoint(context.get_python_api(builder).save_thread(), ir.IntType(64))

    return numba.types.int64(), generate


def _acquire_gil_code(typing: Any, state: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        context.get_python_api(builder).restore_thread(builder.inttoptr(args[0], ir.IntType(8).as_pointer()))
        return context.get_dummy_value()

    return numba.types.void(numba.types.int64), generate


release_gil: Any = intrinsic(_release_gil_code)
"""Let other Python threads run, where the GIL is held; what is returned goes to ``acquire_gil``."""

acquire_gil: Any = intrinsic(_acquire_gil_code)


@jit()
def in_serial(work: int, arguments: Any) -> None:
    """All of a worker's parts by the calling thread; ``arguments`` is an int64 array."""
    call(work, np.int64(arguments.ctypes.data), 0, 1)


@jit(parallel=True)
def in_parallel(work: int, arguments: Any, count: int) -> None:
    """``count`` parts by as many threads."""
    address = np.int64(arguments.ctypes.data)
    for k in numba.prange(count):
        call(work, address, k, count)


def run(work: int, arguments: Any, count: int) -> None:
    """A worker's parts by ``count`` threads; more than one only while the parallel layer is held."""
    if count > 1:
        in_parallel(work, arguments, count)
    else:
        in_serial(work, arguments)


# ------------------------------------------------------------------------------------------------------------ threads

_lock = threading.Lock()
_forked = False


def _after_fork_in_child() -> None:
    # GNU OpenMP's threads do not survive a fork: a parallel kernel would kill the child. The serial ones still work.
    global _lock, _forked
    _lock, _forked = threading.Lock(), True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class workers:  # in lower case, because it is used like a function
    """How many workers a launch may have now, at most ``wanted``; the parallel layer is held while it is more than one.

    One, where another thread is in a parallel kernel (Numba's workqueue layer ends the process when two enter), or
    in a forked child. The results do not depend on it.
    """

    __slots__ = ("_count", "_held")

    def __init__(self, wanted: int) -> None:
        self._held = _lock  # the one of now: after a fork there is another
        self._count = wanted if wanted > 1 and not _forked and self._held.acquire(blocking=False) else 1

    def __enter__(self) -> int:
        return self._count

    def __exit__(self, *raised: object) -> None:
        if self._count > 1:
            self._held.release()


def max_workers() -> int:
    """The number of threads that Numba may use: ``NUMBA_NUM_THREADS``, ``numba.set_num_threads``, or all cores."""
    return int(numba.get_num_threads())
