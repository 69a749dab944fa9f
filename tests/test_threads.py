"""Threads and forks: any of them get the same bits, and how many threads a launch uses."""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numba
import numpy as np
import pytest

from adagrad import RowSparse, kernels
from adagrad.kernels.runtime import numba_jit, threads
from adagrad.rule import Rule
from processes import posix, run
from support import always_parallel

# ---------------------------------------------------------------------------------------------------- threads and forks

LAYERS = pytest.mark.parametrize("layer", ["default", "workqueue", "omp"])

TRAINING = """
    import hashlib, os, sys, threading
    import numpy as np
    from adagrad import AdaGrad, GroupAdaGrad, RowSparse

    def train(seed, steps=4):
        \"\"\"A digest of big updates of all sorts, on optimizers of one's own.\"\"\"
        rng = np.random.default_rng(seed)
        weights = [rng.random(n, dtype=np.float32) for n in (150_000, 7, 60_000)]
        weights.append(rng.random((2000, 30), dtype=np.float32))
        weights.append(rng.random((3000, 20), dtype=np.float32))
        optimizers = [AdaGrad(0.1, wd=0.01), GroupAdaGrad(0.1)]
        states = [[o.create_state(i, w) for i, w in enumerate(weights)] for o in optimizers]
        for _ in range(steps):
            grads = [rng.random(w.shape, dtype=np.float32) for w in weights[:4]]
            rows = np.minimum(rng.zipf(1.3, 20_000) - 1, 2999)
            grads.append(RowSparse(rng.random((20_000, 20), dtype=np.float32), rows, (3000, 20)))
            for optimizer, state in zip(optimizers, states):
                optimizer.update([0, 1, 2, 3, 4], weights, grads, state)
        digest = hashlib.sha256()
        for array in [*weights, *states[0], *states[1]]:
            digest.update(array.tobytes())
        return digest.hexdigest()
"""


def layer_of(name: str) -> dict[str, str]:
    variables = {"NUMBA_NUM_THREADS": "4"}
    return variables if name == "default" else {**variables, "NUMBA_THREADING_LAYER": name}


def needs_layer(layer: str) -> None:
    if layer == "omp":
        pytest.importorskip("numba.np.ufunc.omppool", reason="this build of Numba has no OpenMP")


@pytest.fixture(scope="module")
def alone() -> list[str]:
    """The digests of training with one thread."""
    code = TRAINING + "\n    print(*[train(seed) for seed in range(4)])"
    digests = run(code, NUMBA_NUM_THREADS="1").split()
    assert len(set(digests)) == 4
    return digests


@LAYERS
def test_many_python_threads_at_once(layer: str, alone: list[str]) -> None:
    """Each with optimizers of its own. Numba's workqueue layer ends the process when two enter it, if it is let."""
    needs_layer(layer)
    code = (
        TRAINING
        + """
    digests = [None] * 8

    def work(k):
        digests[k] = train(k % 4)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert digests[:4] == digests[4:]
    import numba
    print(numba.threading_layer(), *digests[:4])
    """
    )
    name, *digests = run(code, **layer_of(layer)).split()
    assert digests == alone
    assert layer in ("default", name)


@posix
@LAYERS
def test_after_a_fork(layer: str, alone: list[str]) -> None:
    """The parent has run parallel kernels, then runs them in another thread as it forks; children of children train."""
    needs_layer(layer)
    code = (
        TRAINING
        + """
    import signal

    def in_child(depth):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            signal.alarm(240)
            text = train(1)
            if depth:
                text += " " + in_child(depth - 1)
            os.write(writing, text.encode())
            os._exit(0)
        os.close(writing)
        with open(reading) as file:
            text = file.read()
        assert os.waitpid(child, 0)[1] == 0, "the child was killed"
        return text

    first = train(0)
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            train(3, steps=1)

    print(first, in_child(1))
    thread = threading.Thread(target=busy)
    thread.start()
    texts = [in_child(0) for _ in range(4)]
    stop.set()
    thread.join()
    print(*texts, train(2), train(3))
    """
    )
    # From Python 3.12 on, a fork beside threads is warned of, which is what this test is about.
    digests = run(code, options=("-W", "ignore"), **layer_of(layer)).split()
    assert digests == [alone[0], alone[1], alone[1], *[alone[1]] * 4, alone[2], alone[3]]


@posix
def test_a_pool_of_forked_processes(alone: list[str]) -> None:
    code = (
        TRAINING
        + """
    import multiprocessing
    train(3)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(*pool.map(train, range(4)))
    """
    )
    assert run(code, options=("-W", "ignore"), NUMBA_NUM_THREADS="4").split() == alone


@pytest.mark.skipif(reason="how to flush is not known here",
                    condition=platform.machine().lower() not in ("x86_64", "amd64", "aarch64", "arm64"))  # fmt: skip
def test_subnormal_numbers_do_not_depend_on_threads_or_on_what_the_caller_flushes() -> None:
    code = """
        import ctypes, platform
        import llvmlite.binding as llvm, numpy as np
        from llvmlite import ir
        from adagrad import kernels
        from adagrad.kernels.runtime import threads
        from adagrad.rule import Rule
        threads.STALL_SECONDS = 1e9
        subnormal, g = np.full(200_000, 1e-39, np.float32), np.full(200_000, 1e-3, np.float32)
        def zeros(threads):
            w, h = subnormal.copy(), np.zeros_like(g)
            kernels.update([w], [g], [h], [1e-40], [0.0], Rule(), fused=True, threads=threads)
            return int((w.view(np.int32) == 0).sum())
        found = [zeros(4)]
        # What sets the floating-point mode of the thread.
        is_arm = platform.machine() in ("aarch64", "arm64")
        void, word, text = ir.VoidType(), ir.IntType(64), ir.IntType(8)
        module = ir.Module()
        function = ir.Function(module, ir.FunctionType(void, [word]), "set_mode")
        builder = ir.IRBuilder(function.append_basic_block())
        if is_arm:
            put = ir.Function(module, ir.FunctionType(void, [word]), "llvm.aarch64.set.fpcr")
            builder.call(put, function.args)
        else:
            put = ir.Function(module, ir.FunctionType(void, [text.as_pointer()]), "llvm.x86.sse.ldmxcsr")
            place = builder.alloca(word)
            builder.store(function.args[0], place)
            builder.call(put, [builder.bitcast(place, text.as_pointer())])
        builder.ret_void()
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)),
                                            llvm.Target.from_default_triple().create_target_machine())
        engine.finalize_object()
        set_mode = ctypes.CFUNCTYPE(None, ctypes.c_int64)(engine.get_function_address("set_mode"))
        usual, flushing = (0, 1 << 24) if is_arm else (0x1F80, 0x9FC0)
        set_mode(flushing)
        found += [zeros(1), zeros(2), zeros(4)]
        results = []
        for step in (1, -1):  # a long row, and one that no kernel can address
            w, h = np.zeros((2, 20_000), np.float32), np.zeros((2, 1), np.float32)
            g = np.full((2, 20_000), 1e-20, np.float32)
            kernels.update([w[::step]], [g], [h], [0.5], [0.0], Rule(epsilon=0.0, row_wise=True), fused=True)
            results += [w.view(np.int32), h.view(np.int32)]
        found.append(int((results[0] != results[2]).sum() + (results[1] != results[3]).sum()))
        found.append(int((results[3] == 0).sum()))
        flushed = subnormal * np.float32(1)
        set_mode(usual)
        assert (flushed == 0).all(), "the caller's own mode stays"
        print(found)
        """
    assert set(run(code, NUMBA_NUM_THREADS="4").strip("[]").split(", ")) == {"0"}


# ----------------------------------------------------------------------------------------------------- how many threads


class Clock:
    """What the launches are timed with, here."""

    now = 0.0
    slept = 0.0

    def perf_counter(self) -> float:
        return self.now

    def thread_time(self) -> float:
        assert threads._stalls, "a system call, which the usual launch does without"
        return self.now - self.slept


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(threads, "time", clock)
    for name in ("_stalls", "_backoff"):
        monkeypatch.setattr(threads, name, 0)
    return clock


def on_threads(kernel: Callable[[np.ndarray, int], object], work: int = 100_000) -> None:
    notes = threads.new_notes(work)

    def claims(count: int) -> None:
        kernel(notes, claims_in_compiled_code(notes, count))
        gives_back_in_compiled_code(notes)

    threads.on_threads(claims, (), notes.data, 2)


@numba_jit.jit()
def claims_in_compiled_code(notes: np.ndarray, count: int) -> int:
    return int(threads.claim(notes, count))


@numba_jit.jit()
def gives_back_in_compiled_code(notes: np.ndarray) -> None:
    threads.give_back(notes)


def test_launches_that_stall_stay_on_the_calling_thread_for_a_while(clock: Clock) -> None:
    """With all cores busy, a launch on several threads waits milliseconds for microseconds of work."""

    def launch(seconds: float, work: int = 100_000) -> int:
        counts = []

        def kernel(notes: np.ndarray, count: int) -> None:
            clock.now += seconds
            counts.append(count)

        on_threads(kernel, work)
        return counts[0]

    slow, quick = threads.STALL_SECONDS + 100_000 * threads.SECONDS_PER_ELEMENT + 1e-6, 1e-4
    for _ in range(5):  # one stall is an accident: a page fault, a compilation
        assert [launch(slow), launch(quick), launch(quick)] == [2, 2, 2]
    assert launch(slow, work=10_000_000) == launch(slow, work=10_000_000) == 2, "much work may take its time"
    assert [launch(slow), launch(slow)] == [2, 2]
    assert [launch(quick) for _ in range(threads.BACKOFF_LAUNCHES)] == [1] * threads.BACKOFF_LAUNCHES
    assert launch(slow) == 2, "the machine is asked again"
    assert [launch(quick) for _ in range(threads.BACKOFF_LAUNCHES)] == [1] * threads.BACKOFF_LAUNCHES
    assert [launch(quick), launch(slow), launch(quick)] == [2, 2, 2], "it is free again, and an accident is one"
    assert [launch(slow), launch(slow), launch(quick)] == [2, 2, 1]
    assert launch(quick, work=threads.ALWAYS_PARALLEL) == 2, "much work is worth a stall, and shows there are cores"
    assert launch(quick) == 2
    assert [launch(slow), launch(quick, work=0), launch(slow), launch(quick)] == [2, 2, 2, 1], "small ones say nothing"


def test_launches_that_sleep_have_not_stalled(clock: Clock) -> None:
    """They wait for the GIL, or for memory that is being swapped in: with one thread, they would wait as long."""

    def kernel(notes: np.ndarray, count: int) -> None:
        assert count == 2
        clock.now += 1
        clock.slept += 1

    for _ in range(5):
        on_threads(kernel)


def test_launches_beside_one_that_stalls_say_nothing(clock: Clock) -> None:
    """They are refused several threads, and so can neither stall nor show that there are cores."""
    counts = []

    def refused(notes: np.ndarray, count: int) -> None:
        assert count == 1
        clock.now += 1e-6

    def stalls(notes: np.ndarray, count: int) -> None:
        if count > 1:
            on_threads(refused)
            clock.now += 1
        counts.append(count)

    for _ in range(3):
        on_threads(stalls)
    assert counts == [2, 2, 1]


def test_refused_launches_that_sleep_have_not_stalled(clock: Clock) -> None:
    def refused(notes: np.ndarray, count: int) -> None:
        assert count == 1
        clock.now += 1

    def holds(notes: np.ndarray, count: int) -> None:
        for _ in range(5):
            on_threads(refused)
        assert not threads._stalls

    on_threads(holds)


def test_work_that_proves_small_has_not_stalled(clock: Clock) -> None:
    def kernel(notes: np.ndarray, count: int) -> None:
        assert count == 2
        clock.now += 1
        notes[threads.WORK] = 0

    for _ in range(5):
        on_threads(kernel)


def test_one_launch_at_a_time_uses_several_threads() -> None:
    """Numba's workqueue layer would end the process when two enter."""

    def claimed(count: int) -> int:
        notes = threads.new_notes(0)
        found = claims_in_compiled_code(notes, count)
        gives_back_in_compiled_code(notes)
        return found

    assert [claimed(count) for count in (0, 1, 2, 3)] == [0, 1, 2, 3]
    assert threads._layer == 0
    try:
        threads._layer[0] = 1
        assert [claimed(count) for count in (0, 1, 2, 3)] == [0, 1, 1, 1]
        assert threads._layer == 1, "another's"
    finally:
        threads._layer[0] = 0


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("kind", ["plain", "strided", "rows", "strided rows", "mixed", "bad row"])
def test_each_launch_leaves_the_layer_as_it_found_it(kind: str, held: bool) -> None:
    values, rows = np.ones((4000, 64), np.float32), np.arange(4000, dtype=np.int64)
    rows[-1] = 10**9 if kind == "bad row" else 7
    weight: Any = np.ones((4000, 128), np.float32)[:, ::2] if "strided" in kind else values.copy()
    grad: Any = RowSparse(values, rows, values.shape) if "row" in kind else values
    weights, grads = [weight], [grad]
    if kind == "mixed":
        weights, grads = [weight, values.copy()], [values, RowSparse(values, rows, values.shape)]
    histories = [np.zeros_like(values) for _ in weights]
    parallel = []
    try:
        threads._layer[0] = held
        with suppress(IndexError), always_parallel():
            kernels.update(weights, grads, histories, [0.5], [0.0], Rule(), fused=True, threads=3)
            parallel.append(True)
        assert parallel or kind == "bad row"
        assert threads._layer[0] == held
    finally:
        threads._layer[0] = 0


def test_as_many_threads_as_numba_may_use_now() -> None:
    before = numba.get_num_threads()
    try:
        for count in {1, before}:
            numba.set_num_threads(count)
            assert threads.max_threads() == count
    finally:
        numba.set_num_threads(before)
