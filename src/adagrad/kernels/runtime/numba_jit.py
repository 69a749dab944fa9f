"""Every Numba option of the library in one place: compilation, and workers for several threads.

No fastmath, so that each operation is rounded as IEEE 754 demands; ``error_model="numpy"``, so that LLVM vectorises
loops, which Python's check for a division by zero would prevent.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import binding as llvm, ir
from numba.core import cgutils
from numba.core.ccallback import CFunc
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.extending import intrinsic

from adagrad.kernels.runtime import cache_folder
from adagrad.kernels.runtime.disk_cache import Cache
from adagrad.kernels.runtime.interrupts import uninterrupted

if numba.config.DISABLE_JIT:
    raise RuntimeError(
        "NUMBA_DISABLE_JIT is set: the kernels must be compiled; AdaGrad(use_fused_step=False) needs none"
    )

cache_folder.find()  # a warning is given here; below, what goes wrong with the cache is ignored

# ---------------------------------------------------------------------------------------------------------- compilation

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": False, "boundscheck": False}


class _NoEnvironments:
    """In place of Numba's ``codegen``, which would look for a helper's environment in its machine code.

    An environment holds Python's objects. Without it, a helper must neither print nor raise an exception with an
    argument that is computed when it runs; constant messages, as those of ``np.empty``, need none.
    """

    @staticmethod
    def set_env(env_name: str, env: object) -> None:
        pass


class _HelperLibrary(JITCodeLibrary):  # type: ignore[misc]
    """A helper's code, optimised and ready to be linked into its callers'.

    Numba would also generate its machine code, with that of all it calls; nobody runs that, and it would be a fifth of
    the compile time.
    """

    codegen = _NoEnvironments

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True


class _HelperCompiler(Compiler):  # type: ignore[misc]
    def compile_extra(self, func: Callable[..., Any]) -> Any:
        self.state.library = _HelperLibrary(self.state.targetctx.codegen(), func.__qualname__)
        return super().compile_extra(func)


def jit(
    *, parallel: bool = False, helper: bool = False, inline: bool = True, holds_gil: bool = False
) -> Callable[[F], F]:
    """Decorator: compile at the first call with new argument types, and keep the machine code for the next process.

    A ``helper`` is called only by other kernels: it is compiled into them, so that what is the same for all of its
    calls is computed once, and it needs no cache file; not ``inline`` if it is called from many places. Code that reads
    Python's objects ``holds_gil``.
    """

    def compile_lazily(function: F) -> F:
        options: dict[str, Any] = {**_OPTIONS, "parallel": parallel, "nogil": not holds_gil}
        # Wrappers that nobody calls would be 10 to 20% of compile time.
        options |= {"no_cpython_wrapper": helper, "no_cfunc_wrapper": True}
        if helper:
            options |= {"forceinline": inline, "pipeline_class": _HelperCompiler}
        dispatcher = numba.jit(nopython=True, **options)(function)
        if helper:
            template_for = dispatcher.get_call_template
            # Numba would compile it again for each constant that it is called with.
            dispatcher.get_call_template = lambda args, kws: template_for(
                tuple(map(numba.types.unliteral, args)), {name: numba.types.unliteral(arg) for name, arg in kws.items()}
            )
        else:
            compile_for = dispatcher._compile_for_args
            dispatcher._compile_for_args = lambda *args, **kws: uninterrupted(lambda: compile_for(*args, **kws))
            with suppress(Exception):  # without a cache it is slower, not wrong
                dispatcher._cache = Cache(function)
        return cast(F, dispatcher)

    return compile_lazily


def entry(helper: F, *, holds_gil: bool = False) -> F:
    """Compile a helper once more, for calls from Python."""
    return cast(F, jit(holds_gil=holds_gil)(cast(Any, helper).py_func))


# -------------------------------------------------------------------------------------------------------------- workers
#
# Work for several threads is compiled once, as a C function `worker(arguments, k, workers)` for the k-th of so many
# parts; one serial and one parallel driver call it by address. Otherwise every kernel would be compiled into two
# drivers, and again for each of Numba's layers around a parallel loop: a minute instead of seconds.


def worker(function: Callable[[Any, Any, Any], None]) -> int:
    """Compile ``function(arguments, k, workers)`` and return its address; ``arguments`` is that of an int64 array.

    What it closes over is part of its name in the cache: numbers, types, arrays, but no compiled function, which has a
    name of its own in each process.
    """
    void, word = numba.types.void, numba.types.int64
    options = {"nopython": True, **_OPTIONS}
    compiled: Any = CFunc(function, numba.core.sigutils.normalize_signature(void(word, word, word)), {}, options)
    with suppress(Exception):
        compiled._cache = Cache(function)
    uninterrupted(compiled.compile)
    _compiled.append(compiled)  # keeps its machine code alive
    return int(compiled.address)


_compiled: list[Any] = []


_BYTES = ir.IntType(8).as_pointer()


def _call_code(typing: Any, worker_at: Any, arguments: Any, k: Any, workers: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [word, word, word])
        worker_at = builder.inttoptr(args[0], kind.as_pointer())
        # Some programs make the calling thread flush subnormal numbers; the threads of the pool do not. Flushing is
        # turned off here, so that the result depends on neither.
        restore = _stop_flushing(builder)
        builder.call(worker_at, args[1:])
        restore()
        return context.get_dummy_value()

    word = numba.types.int64
    return numba.types.void(word, word, word, word), generate


_PROCESSOR = llvm.get_process_triple().split("-")[0]

IS_ARM = _PROCESSOR in ("aarch64", "arm64")
"""Whether this process runs on a 64-bit ARM processor."""


def _stop_flushing(builder: Any) -> Callable[[], object]:
    """Turn off what flushes subnormal numbers to zero; return what turns it on again if it was on."""

    def function(name: str, result: Any, *arguments: Any) -> Any:
        return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), f"llvm.{name}")

    void, word, control = ir.VoidType(), ir.IntType(64), ir.IntType(32)
    if _PROCESSOR == "x86_64":
        store, load = function("x86.sse.stmxcsr", void, _BYTES), function("x86.sse.ldmxcsr", void, _BYTES)
        place = cgutils.alloca_once(builder, control)
        at = builder.bitcast(place, _BYTES)
        builder.call(store, [at])
        before = builder.load(place)

        def put(value: Any) -> None:
            builder.store(value, place)
            builder.call(load, [at])

        put(builder.and_(before, control(~0x8040 & 0xFFFFFFFF)))  # FTZ and DAZ of MXCSR
        return lambda: put(before)
    if IS_ARM:
        get, set_ = function("aarch64.get.fpcr", word), function("aarch64.set.fpcr", void, word)
        before = builder.call(get, [])
        builder.call(set_, [builder.and_(before, word(~0x1080001))])  # FZ, FZ16 and FIZ of FPCR
        return lambda: builder.call(set_, [before])
    return lambda: None


call_worker: Any = intrinsic(_call_code)
"""``call_worker(worker_at, arguments, k, workers)``: call the worker at an address, subnormal numbers not flushed."""


def _release_gil_code(typing: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.ptrtoint(context.get_python_api(builder).save_thread(), ir.IntType(64))

    return numba.types.int64(), generate


def _acquire_gil_code(typing: Any, state: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        context.get_python_api(builder).restore_thread(builder.inttoptr(args[0], _BYTES))
        return context.get_dummy_value()

    return numba.types.void(numba.types.int64), generate


release_gil: Any = intrinsic(_release_gil_code)
"""Release the GIL, which must be held; pass the result to ``acquire_gil``."""

acquire_gil: Any = intrinsic(_acquire_gil_code)


@jit(parallel=True)
def _in_parallel(worker_at: int, arguments: Any, workers: int) -> None:
    address = np.int64(arguments.ctypes.data)
    for k in numba.prange(workers):
        call_worker(worker_at, address, k, workers)


@jit()
def run(worker_at: int, arguments: Any, workers: int) -> None:
    """Run the ``workers`` parts of the worker at the address ``worker_at`` on as many threads.

    More than one only between :func:`adagrad.kernels.runtime.threads.claim` and ``give_back``. ``arguments`` are int64.
    """
    if workers > 1:
        _in_parallel(worker_at, arguments, workers)
    else:
        call_worker(worker_at, np.int64(arguments.ctypes.data), 0, 1)


@jit(helper=True)
def worker_count(work: Any, parallel_min: int, workers: int) -> Any:
    """How many workers so much work is worth: ``workers``, but one if ``work`` is less than ``parallel_min``."""
    return workers if work >= parallel_min and workers > 1 else 1
