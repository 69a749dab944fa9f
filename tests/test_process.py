"""Processes, threads and files: what is imported, the kernel cache, forks, layers of threads, memory."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

import adagrad
from adagrad import RowSparse, kernels
from adagrad.kernels import disk_cache, numba_jit, threads
from adagrad.kernels.interrupts import uninterrupted
from adagrad.rule import Rule
from support import always_parallel

SOURCES = str(Path(adagrad.__file__).parents[1])
LIMIT = 300
"""Seconds after which a process is taken to hang."""

posix = pytest.mark.skipif(os.name != "posix", reason="forks, permissions and peaks of memory are asked of POSIX")


def start(code: str, *, options: tuple[str, ...] = ("-W", "error"), **environment: str | None) -> subprocess.Popen[str]:
    """A fresh interpreter that runs ``code``; a variable given as None is taken out of its environment."""
    variables = {**os.environ, "PYTHONPATH": SOURCES, **environment}
    return subprocess.Popen(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        env={name: value for name, value in variables.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What it printed; a failure or a hang fails the test."""
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"still running after {LIMIT} s\n{out}\n{err}") from None
    assert process.returncode == 0, f"ended with {process.returncode}\n{out}\n{err}"
    return out.strip()


def run(code: str, **environment: Any) -> str:
    return finish(start(code, **environment))


# -------------------------------------------------------------------------------------------------------------- imports


def test_importing_imports_no_framework_and_no_compiler() -> None:
    code = """
        import sys
        import adagrad
        from adagrad import *
        print(sorted({"torch", "triton", "jax", "numba", "llvmlite", "safetensors", "ml_dtypes"} & set(sys.modules)))
        import numpy as np
        weight = np.ones(3)
        optimizer = AdaGrad(use_fused_step=False)
        optimizer.update(0, weight, weight.copy(), optimizer.create_state(0, weight))
        print(sorted({"torch", "triton", "jax", "numba"} & set(sys.modules)))
        optimizer.use_fused_step = True
        rows = RowSparse(np.ones(1), np.array([2]), (3,))
        optimizer.update([0, 1], [weight, weight.copy()], [weight.copy(), rows], [weight.copy(), weight.copy()])
        print(sorted({"torch", "triton", "jax"} & set(sys.modules)))
    """
    assert run(code).split() == ["[]", "[]", "[]"]


def test_the_public_names() -> None:
    for name in adagrad.__all__:
        assert hasattr(adagrad, name)
    assert set(adagrad.__all__) >= {
        "AdaGrad", "GroupAdaGrad", "Optimizer", "register", "create", "Updater", "get_updater", "RowSparse",
        "lr_scheduler",
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------- the kernel cache


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The environment without what the cache folder depends on; what is known of it is forgotten before and after."""
    for name in ("ADAGRAD_CACHE_DIR", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    disk_cache.cache_folder.cache_clear()
    yield monkeypatch
    disk_cache.cache_folder.cache_clear()


def small_kernel() -> Any:
    """A kernel of its own each time, of the same name and code."""

    @numba_jit.jit()
    def add(a: Any, b: Any) -> Any:
        return a + b

    return add


def loaded_from_cache(kernel: Any) -> bool:
    assert kernel(1, 2) == 3
    assert kernel(0.5, 1.0) == 1.5
    hits, misses = sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values())
    assert hits + misses in (0, 2)
    return hits == 2


def as_file(path: Path) -> Path:
    path.write_text("not a folder")
    return path


def read_only(path: Path) -> Path:
    path.mkdir(mode=0o500)
    return path


@posix
@pytest.mark.parametrize("variable", ["ADAGRAD_CACHE_DIR", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"])
@pytest.mark.parametrize(
    ("make", "usable"),
    [
        (lambda path: path / "new" / "folders", True),
        (lambda path: as_file(path / "file"), False),
        (lambda path: as_file(path / "file") / "below", False),
        (lambda path: Path("/proc/self/nowhere"), False),
        (lambda path: Path("/dev/null"), False),
        (lambda path: read_only(path / "read-only"), os.getuid() == 0 if hasattr(os, "getuid") else None),
    ],
    ids=["missing", "a file", "below a file", "not to be made", "a device", "read-only"],
)
def test_any_folder_works(
    variable: str, make: Callable[[Path], Path], usable: bool, tmp_path: Path, no_variables: pytest.MonkeyPatch
) -> None:
    """Where there is no folder to be had, kernels are compiled, and forgotten with the process."""
    folder = make(tmp_path)
    no_variables.setenv(variable, str(folder))
    found = disk_cache.cache_folder()
    assert (found is not None) == usable
    first, second = loaded_from_cache(small_kernel()), loaded_from_cache(small_kernel())
    assert (first, second) == (False, usable)
    if found is not None:
        assert folder in found.parents
        assert found.stat().st_mode & 0o777 == 0o700


def test_the_order_of_the_variables(tmp_path: Path, no_variables: pytest.MonkeyPatch) -> None:
    for variable in ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "ADAGRAD_CACHE_DIR"):
        no_variables.setenv(variable, str(tmp_path / variable))
        disk_cache.cache_folder.cache_clear()
        folder = disk_cache.cache_folder()
        if sys.platform == "linux" or variable.endswith("_DIR"):
            assert folder is not None
            assert tmp_path / variable in folder.parents


@posix
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702])
def test_a_folder_that_others_can_write_to_is_not_used(
    mode: int, tmp_path: Path, no_variables: pytest.MonkeyPatch
) -> None:
    """It holds pickles and machine code."""
    no_variables.setenv("ADAGRAD_CACHE_DIR", str(tmp_path))
    folder = disk_cache.cache_folder()
    assert folder is not None
    loaded_from_cache(small_kernel())
    before = sorted(folder.iterdir())
    assert before
    folder.chmod(mode)
    disk_cache.cache_folder.cache_clear()
    assert disk_cache.cache_folder() is None
    assert not loaded_from_cache(small_kernel())
    assert sorted(folder.iterdir()) == before
    folder.chmod(0o700)
    disk_cache.cache_folder.cache_clear()
    assert loaded_from_cache(small_kernel())


@posix
def test_a_folder_that_others_can_replace_is_not_used(tmp_path: Path, no_variables: pytest.MonkeyPatch) -> None:
    """Whoever can write to a folder above can put another in its place, unless that is sticky, as /tmp is."""
    no_variables.setenv("ADAGRAD_CACHE_DIR", str(tmp_path / "above" / "cache"))
    folder = disk_cache.cache_folder()
    assert folder is not None
    for mode, safe in [(0o777, False), (0o1777, True), (0o755, True), (0o707, False)]:
        (tmp_path / "above").chmod(mode)
        disk_cache.cache_folder.cache_clear()
        assert (disk_cache.cache_folder() == folder) == safe


as_root = pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give a folder away")


@posix
@as_root
@pytest.mark.parametrize(("owner", "group", "mode", "safe"), [
    (0, 0, 0o775, True), (0, 12345, 0o775, False), (0, 12345, 0o755, True), (12345, 0, 0o1777, False),
    (12345, 0, 0o755, False), (0, 12345, 0o1775, True),
])  # fmt: skip
def test_a_folder_that_is_in_one_of_another_user_or_group(
    owner: int, group: int, mode: int, safe: bool, tmp_path: Path, no_variables: pytest.MonkeyPatch
) -> None:
    """Whose owner, sticky or not, and whose group, if it may write and is not one's own, can replace it."""
    no_variables.setenv("ADAGRAD_CACHE_DIR", str(tmp_path / "above" / "cache"))
    folder = disk_cache.cache_folder()
    assert folder is not None
    os.chown(tmp_path / "above", owner, group)
    (tmp_path / "above").chmod(mode)
    disk_cache.cache_folder.cache_clear()
    assert (disk_cache.cache_folder() == folder) == safe


@posix
@as_root
def test_a_folder_of_another_user_is_not_used(tmp_path: Path, no_variables: pytest.MonkeyPatch) -> None:
    no_variables.setenv("ADAGRAD_CACHE_DIR", str(tmp_path))
    folder = disk_cache.cache_folder()
    assert folder is not None
    os.chown(folder, 12345, 12345)
    disk_cache.cache_folder.cache_clear()
    no_variables.setattr(os, "getuid", lambda: 54321)
    assert disk_cache.cache_folder() is None


@posix
@pytest.mark.parametrize(("group", "name", "members", "is_private"), [
    (1002, "ann", [], True), (1002, "ann", ["ann"], True), (1002, "ann", ["bob"], False), (1002, "staff", [], False),
    (1002, None, [], False), (1001, "staff", ["bob"], True), (0, "root", [], True),
])  # fmt: skip
def test_what_a_private_group_is(
    group: int, name: str | None, members: list[str], is_private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    grp, pwd = pytest.importorskip("grp"), pytest.importorskip("pwd")

    def found(number: int) -> Any:
        if name is None:
            raise KeyError(number)
        return grp.struct_group((name, "x", number, members))

    monkeypatch.setattr(os, "getuid", lambda: 1001)
    monkeypatch.setattr(grp, "getgrgid", found)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: pwd.struct_passwd(("ann", "x", 1001, 1002, "", "/", "")))
    assert disk_cache._has_no_others(group) == is_private


@posix
def test_our_own_folders_are_private_whatever_the_umask(tmp_path: Path, no_variables: pytest.MonkeyPatch) -> None:
    no_variables.setenv("XDG_CACHE_HOME", str(tmp_path))
    no_variables.setattr(sys, "platform", "linux")
    before = os.umask(0o002)
    try:
        folder = disk_cache.cache_folder()
    finally:
        os.umask(before)
    assert folder is not None
    assert [each.stat().st_mode & 0o777 for each in (folder, folder.parent)] == [0o700, 0o700]
    assert folder.parent == tmp_path.resolve() / "adagrad"


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "zeros": lambda data: bytes(len(data)),
    "zeros at the end": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "text": lambda data: b"something else altogether",
    "another pickle": lambda data: b"\x80\x04N.\x80\x04N.",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_files_cost_a_compilation(
    damage: Callable[[bytes], bytes], tmp_path: Path, no_variables: pytest.MonkeyPatch
) -> None:
    """And no more: the next process finds them repaired."""
    no_variables.setenv("ADAGRAD_CACHE_DIR", str(tmp_path))
    assert not loaded_from_cache(small_kernel())
    assert loaded_from_cache(small_kernel())
    folder = disk_cache.cache_folder()
    assert folder is not None
    damaged = list(folder.iterdir())
    assert len(damaged) == 2, "one for each signature"
    for path in damaged:
        path.write_bytes(damage(path.read_bytes()))
    assert not loaded_from_cache(small_kernel())
    assert loaded_from_cache(small_kernel())


def test_files_that_vanish(tmp_path: Path, no_variables: pytest.MonkeyPatch) -> None:
    no_variables.setenv("ADAGRAD_CACHE_DIR", str(tmp_path))
    loaded_from_cache(small_kernel())
    folder = disk_cache.cache_folder()
    assert folder is not None
    shutil.rmtree(folder)
    assert not loaded_from_cache(small_kernel())


STEP = """
    import numpy as np
    from adagrad import GroupAdaGrad  # whose dense kernel compiles fastest
    optimizer, weight = GroupAdaGrad(0.5, wd=0.1), np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
    state = optimizer.create_state(0, weight)
    optimizer.update(0, weight, weight * 3, state)
    print(weight.tobytes().hex(), state.tobytes().hex())
"""


def test_code_that_calls_what_was_loaded(tmp_path: Path) -> None:
    """One process compiles a kernel whose parallel driver it loads; the next loads both."""
    variables = {"ADAGRAD_CACHE_DIR": str(tmp_path)}
    expected = run(STEP, **variables)
    compiled_again = list(tmp_path.rglob("dense_lists._update*"))
    assert compiled_again
    for path in compiled_again:
        path.unlink()
    assert run(STEP, **variables) == expected
    assert run(STEP, **variables) == expected


def test_formats_that_were_compiled_by_different_processes(tmp_path: Path) -> None:
    """Their machine code has the same symbols, and one process loads them all."""
    code = STEP.replace("GroupAdaGrad", "AdaGrad").replace("np.float32", "dtype")
    formats = ["np.float32", "np.float64", "np.float16"]
    alone = [code.replace("dtype=dtype", f"dtype={dtype}") for dtype in formats]
    folders = [tmp_path / dtype for dtype in formats]
    processes = [start(one, ADAGRAD_CACHE_DIR=str(folder)) for one, folder in zip(alone, folders, strict=True)]
    expected = list(map(finish, processes))
    for folder in folders:
        shutil.copytree(folder, tmp_path / "all", dirs_exist_ok=True)
    for order in (formats, formats[::-1]):
        loop = f"import numpy as np\nfor dtype in {', '.join(order)}:\n{textwrap.indent(textwrap.dedent(code), '    ')}"
        got = run(loop, ADAGRAD_CACHE_DIR=str(tmp_path / "all")).splitlines()
        assert got == (expected if order is formats else expected[::-1])


def test_eight_processes_at_once_with_a_cold_cache(tmp_path: Path) -> None:
    """All compile, or wait, or load what another has written; all get the same bits. A ninth finds a warm cache."""
    processes = [start(STEP, ADAGRAD_CACHE_DIR=str(tmp_path)) for _ in range(8)]
    results = {finish(process) for process in processes}
    assert results == {run(STEP)}
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")}
    assert files
    assert run(STEP, ADAGRAD_CACHE_DIR=str(tmp_path)) in results
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")} == files, "nothing was compiled again"


@posix
def test_no_cache_at_all(tmp_path: Path) -> None:
    nowhere = str(as_file(tmp_path / "file"))
    variables = dict.fromkeys(("ADAGRAD_CACHE_DIR", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"), nowhere)
    assert run(STEP, **variables) == run(STEP)


def test_a_processor_without_instructions_for_float16() -> None:
    """There float16 is read and written by integer arithmetic, to the same bits."""
    code = STEP.replace("np.float32", "np.float16")
    assert run(code, NUMBA_CPU_NAME="generic") == run(code)


# --------------------------------------------------------------------------------------------------- threads and forks

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


# --------------------------------------------------------------------------------------------------------------- memory

MEMORY = """
    import sys
    import numpy as np
    from adagrad import AdaGrad, GroupAdaGrad, RowSparse

    def status(name):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

    def peak(optimizer, weight, grad):
        \"\"\"Bytes above what is there before the third step, at its peak; the first two bring in code and pages.\"\"\"
        state = optimizer.create_state_multi_precision(0, weight)
        for array in [weight, *(state if isinstance(state, tuple) else [state])]:
            array[...] = array + array.dtype.type(1)
        for _ in range(2):
            optimizer.update(0, weight, grad, state)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = status("VmRSS")
        optimizer.update(0, weight, grad, state)
        print(status("VmHWM") - before, weight.nbytes)
"""

linux = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peaks of memory are asked of Linux")

DENSE: dict[str, Any] = {
    "float32": "AdaGrad(), np.ones((4000, 4000), np.float32), np.ones((4000, 4000), np.float32)",
    "float16, master": "AdaGrad(multi_precision=True), np.ones((4000, 4000), np.float16), np.ones((4000, 4000), 'f2')",
    "fortran order": "AdaGrad(), np.ones((4000, 4000), np.float32, order='F'), np.ones((4000, 4000), np.float32)",
    "stepped": "AdaGrad(), np.ones((8000, 4000), np.float32)[::2], np.ones((4000, 8000), np.float32)[:, ::2]",
    "byte-swapped": "AdaGrad(), np.ones((4000, 4000), '>f4'), np.ones((4000, 4000), '>f4')",
    "row-wise": "GroupAdaGrad(), np.ones((4000, 4000), np.float32), np.ones((4000, 4000), np.float32)",
    "row-wise, stepped": "GroupAdaGrad(), np.ones((8000, 4000), 'f4')[::2], np.ones((4000, 8000), 'f4')[:, ::2]",
    "row-wise, long rows, stepped": (
        "GroupAdaGrad(), np.ones((2, 16_000_000), np.float32)[:, ::2], np.ones((2, 8_000_000), np.float32)"
    ),
    "row-wise, long rows, float16, fortran order": (
        "GroupAdaGrad(multi_precision=True), np.ones((2, 8_000_000), 'f2', order='F'), np.ones((2, 8_000_000), 'f2')"
    ),
}


@linux
@pytest.mark.parametrize("arguments", DENSE.values(), ids=DENSE)
def test_no_temporary_the_size_of_the_weight(arguments: str) -> None:
    used, size = map(int, run(MEMORY + f"\n    peak({arguments})").split())
    assert size >= 30e6
    assert used < size / 100


@linux
@pytest.mark.parametrize("layout", ["C", "F", "stepped", "row-wise"])
def test_row_sparse_temporaries_are_of_the_rows_present(layout: str) -> None:
    code = (
        MEMORY
        + f"""
    shape = (400_000, 64)
    weight = np.ones((400_000, 128), np.float32)[:, ::2] if "{layout}" == "stepped" else \\
        np.ones(shape, np.float32, order="F" if "{layout}" == "F" else "C")
    rows = np.random.default_rng(0).integers(0, shape[0], 2000)
    optimizer = (GroupAdaGrad if "{layout}" == "row-wise" else AdaGrad)()
    peak(optimizer, weight, RowSparse(np.ones((2000, 64), np.float32), rows, shape))
    """
    )
    used, size = map(int, run(code).split())
    assert size > 100e6
    present = 2000 * 64 * 4
    assert used < 6 * present


@linux
def test_a_frequent_row_takes_no_memory_of_its_occurrences() -> None:
    """200,000 occurrences of a few rows: the sums of their chunks and the keys, not the values again."""
    code = (
        MEMORY
        + """
    rows, shape = np.random.default_rng(0).integers(0, 3, 200_000), (1000, 64)
    peak(AdaGrad(), np.ones(shape, np.float32), RowSparse(np.ones((200_000, 64), np.float32), rows, shape))
    """
    )
    used, _ = map(int, run(code).split())
    assert used < 200_000 * 64 * 4 / 4


@linux
@pytest.mark.parametrize("megabytes", [200, 300])
def test_no_memory_for_the_sums(megabytes: int) -> None:
    """Rows of several megabytes each occur twice: nothing is updated, nothing counted, and it is said."""
    code = f"""
        import re, resource
        from pathlib import Path
        import numpy as np
        from adagrad import AdaGrad, RowSparse
        def example(n, length):
            values = np.ones((2 * n, length), np.float32)
            return np.ones((n, length), np.float32), np.zeros((n, length), np.float32), RowSparse(
                values, np.repeat(np.arange(n), 2), (n, length))
        optimizer = AdaGrad()
        weight, history, grad = example(4, 4)
        optimizer.update(0, weight, grad, history)
        weight, history, grad = example(300, 300_000)
        size = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
        resource.setrlimit(resource.RLIMIT_AS, ((size + {megabytes} * 1024) * 1024,) * 2)
        try:
            optimizer.update(1, weight, grad, history)
        except MemoryError as error:
            same = all((w == 1).all() and (h == 0).all() for w, h in zip(weight, history, strict=True))
            print(error, same, optimizer._index_update_count)
        """
    assert run(code).endswith(": 600 row ids: too many for the memory that is left True {0: 1}")


@linux
def test_without_memory_for_the_sums_nothing_else_changes_either() -> None:
    """Neither dense gradients of the same call nor later row-sparse ones, nor any count."""
    pytest.importorskip("torch")
    code = """
        import re, resource
        from pathlib import Path
        import torch
        from adagrad.torch import Adagrad
        def sparse(shape):
            ids = torch.arange(shape[0]).repeat_interleave(2)[None]
            return torch.sparse_coo_tensor(ids, torch.ones(2 * shape[0], shape[1]), shape, check_invariants=False)
        def set_gradients(*shapes):
            for p, shape in zip(params, shapes):
                p.grad = sparse(shape) if shape else torch.ones_like(p)
        params = [torch.nn.Parameter(torch.ones(size)) for size in ((7,), (300, 300_000), (4, 4))]
        optimizer = Adagrad(params)
        set_gradients((), None, (4, 4))
        params[1].grad = torch.sparse_coo_tensor(torch.zeros(1, 2).long(), torch.ones(2, 300_000), params[1].shape,
                                                 check_invariants=False)
        optimizer.step()
        before = [p.detach().clone() for p in params]
        set_gradients((), (300, 300_000), (4, 4))
        size = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
        resource.setrlimit(resource.RLIMIT_AS, ((size + 200 * 1024) * 1024,) * 2)
        try:
            optimizer.step()
        except MemoryError as error:
            same = all((row == other).all() for p, b in zip(params, before) for row, other in zip(p.detach(), b))
            print("no memory", same, [optimizer.state[p]["step"].item() for p in params])
        """
    assert run(code).endswith("no memory True [1.0, 1.0, 1.0]")


@linux
def test_what_finds_no_memory_leaves_none_behind() -> None:
    code = """
        import re, resource, sys
        from pathlib import Path
        import numpy as np
        from adagrad import AdaGrad, RowSparse

        def status(name):
            return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

        def attempt():
            try:
                optimizer.update(0, weight, grad, history)
            except MemoryError:
                return
            raise AssertionError("there was memory")

        sys.unraisablehook = lambda _: None
        rows, length = 100_000, 256
        weight, history = np.ones((rows, length), np.float32), np.ones((rows, length), np.float32)
        values, ids = np.ones((2 * rows, length), np.float32), np.repeat(np.arange(rows), 2)
        optimizer, grad = AdaGrad(), RowSparse(values, ids, weight.shape)
        optimizer.update(0, weight[:500], RowSparse(values[:1000], ids[:1000], (500, length)), history[:500])
        resource.setrlimit(resource.RLIMIT_AS, ((status("VmSize") + 40 * 1024) * 1024,) * 2)
        attempt()
        before = status("VmRSS")
        for _ in range(8):
            attempt()
        print(status("VmRSS") - before)
        """
    # One arena: glibc reserves 64 MiB for each further one, in which there may be memory beyond the limit.
    assert int(run(code, MALLOC_ARENA_MAX="1")) < 4096, "KiB"


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


def test_launches_that_stall_stay_on_the_calling_thread_for_a_while(clock: Clock) -> None:
    """With all cores busy, a launch on several threads waits milliseconds for microseconds of work."""

    def launch(seconds: float, work: int = 100_000) -> int:
        def kernel(count: int) -> int:
            clock.now += seconds
            return count

        return int(threads.on_threads(kernel, (), [work], 2))

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

    def kernel(count: int) -> None:
        assert count == 2
        clock.now += 1
        clock.slept += 1

    for _ in range(5):
        threads.on_threads(kernel, (), [100_000], 2)


def test_work_that_proves_small_has_not_stalled(clock: Clock) -> None:
    def kernel(work: list[int], count: int) -> None:
        assert count == 2
        clock.now += 1
        work[0] = 0

    for _ in range(5):
        work = [100_000]
        threads.on_threads(kernel, (work,), work, 2)


@numba_jit.jit()
def claimed(layer: int, count: int) -> int:
    found = threads.claim(layer, count)
    threads.give_back(layer, found)
    return found


def test_one_launch_at_a_time_uses_several_threads() -> None:
    """Numba's workqueue layer would end the process when two enter."""
    layer = np.zeros(1, np.int64)
    assert [claimed(layer.ctypes.data, count) for count in (0, 1, 2, 3)] == [0, 1, 2, 3]
    assert layer == 0
    layer[0] = 1
    assert [claimed(layer.ctypes.data, count) for count in (0, 1, 2, 3)] == [0, 1, 1, 1]
    assert layer == 1, "another's"


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


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64", "aarch64", "arm64"), reason="how to flush is not known here"
)
def test_subnormal_numbers_do_not_depend_on_threads_or_on_what_the_caller_flushes() -> None:
    code = """
        import ctypes, platform
        import llvmlite.binding as llvm, numpy as np
        from llvmlite import ir
        from adagrad import kernels
        from adagrad.kernels import threads
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


def test_a_flipped_bit_in_a_cache_file_costs_a_compilation(tmp_path: Path) -> None:
    variables = {"ADAGRAD_CACHE_DIR": str(tmp_path)}
    expected = run(STEP, **variables)
    files = sorted(tmp_path.rglob("*.nbc"))
    for path in files:
        data = bytearray(path.read_bytes())
        data[len(data) * 9 // 10] ^= 4  # in the machine code
        path.write_bytes(data)
    assert run(STEP, **variables) == expected


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="access is not by user here")
def test_a_link_on_the_way_to_the_cache_is_followed_once(tmp_path: Path) -> None:
    """Another user who may turn the link elsewhere turns nothing."""
    private, open_to_all = tmp_path / "private", tmp_path / "open"
    private.mkdir(mode=0o700)
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    (open_to_all / "cache").symlink_to(private)
    code = "from adagrad.kernels.disk_cache import cache_folder; print(cache_folder())"
    assert run(code, ADAGRAD_CACHE_DIR=str(open_to_all / "cache")).startswith(str(private.resolve()))


@pytest.mark.parametrize("fused", [True, False])
def test_while_another_thread_imports_torch_and_ml_dtypes(fused: bool) -> None:
    code = f"""
        import sys, types
        for name in ("torch", "ml_dtypes"):
            sys.modules[name] = types.ModuleType(name)
        import numpy as np
        from adagrad import AdaGrad
        optimizer, weight = AdaGrad(0.5, epsilon=0.0, use_fused_step={fused}), np.ones(3, np.float32)
        optimizer.update(0, weight, weight.copy(), optimizer.create_state(0, weight))
        print(weight.tolist())
        """
    assert run(code) == "[0.5, 0.5, 0.5]"


@posix
def test_nothing_is_read_or_written_beyond_an_array() -> None:
    """Each operand ends where a page ends; the next page is closed, and touching it ends the process."""
    code = """
        import ctypes, itertools, mmap
        import ml_dtypes, numpy as np
        from adagrad import AdaGrad, GroupAdaGrad
        page, protect = mmap.PAGESIZE, ctypes.CDLL(None).mprotect
        protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        def at_the_end(shape, dtype, value):
            memory, dtype = mmap.mmap(-1, 2 * page), np.dtype(dtype)
            assert protect(ctypes.addressof(ctypes.c_char.from_buffer(memory)) + page, page, 0) == 0
            array = np.ndarray(shape, dtype, memory, page - int(np.prod(shape)) * dtype.itemsize)
            array[...] = value
            return array
        dtypes = np.float32, np.float64, np.float16, ml_dtypes.bfloat16
        for dtype, shape, klass in itertools.product(dtypes, [(1,), (15,), (17,), (3, 5)], (AdaGrad, GroupAdaGrad)):
            optimizer, weight = klass(1.0, epsilon=0.0, multi_precision=True), at_the_end(shape, dtype, 2)
            state = optimizer.create_state_multi_precision(0, weight)
            parts = [at_the_end(s.shape, s.dtype, s) for s in (state if isinstance(state, tuple) else [state])]
            state = tuple(parts) if isinstance(state, tuple) else parts[0]
            optimizer.update_multi_precision(0, weight, at_the_end(shape, dtype, 0.5), state)
            assert (weight == 1).all(), (dtype, shape, klass)
        print("done")
        """
    assert run(code) == "done"
