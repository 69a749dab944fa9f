"""Launches of CUDA kernels: what is known of compiled ones; what arrives at the driver, which runs nothing here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

from adagrad.kernels.cuda import launch  # noqa: E402
from adagrad.kernels.cuda.launch import Kernel, form_and_words  # noqa: E402


class Function:
    """A Triton function that compiles into a record of its launches."""

    @staticmethod
    def fn(x: Any, n: Any, y: Any, LAST: Any, BLOCK: Any) -> None: ...

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.direct: list[Any] = []

    def warmup(self, *arguments: Any, grid: Any, **constants: Any) -> Any:
        self.asked.append((grid, arguments, constants))
        return Compiled(self.direct)

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **constants: self.asked.append((grid, arguments, constants))


class Compiled:
    def __init__(self, launches: list[Any]) -> None:
        self.launches = launches

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments: self.launches.append((grid, arguments))


def test_triton_is_asked_once_for_each_form_of_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_KEEPS", True)
    function, memory = Function(), torch.zeros(64)
    kernel = Kernel(function, 4, BLOCK=8, LAST=True)
    x, y = memory[:8], memory[16:24]
    kernel.launch(3, x, 48, y)
    options = {"BLOCK": 8, "LAST": True, "num_warps": 4, "enable_fp_fusion": False}
    assert function.asked == [((3,), (x, 48, y), options)]
    assert function.direct.pop() == ((3, 1, 1), (x.data_ptr(), 48, y.data_ptr(), True, 8))
    other = memory[32:40]
    kernel.launch(5, other, 16, x)
    # All that it was called with, tensors by address, then the constants in the function's order.
    assert function.direct == [((5, 1, 1), (other.data_ptr(), 16, x.data_ptr(), True, 8))]
    assert len(function.asked) == 1
    for arguments in [(x, 17, y), (x, 1, y), (x, 2**31, y), (x, 48, None), (x, 48, y.double()), (x, 48, memory[1:9])]:
        before = len(function.asked)
        kernel.launch(1, *arguments)
        kernel.launch(1, *arguments)
        assert len(function.asked) == before + 1
    assert len(function.direct) == 13


@pytest.mark.parametrize("kind", ["an older version", "the interpreter", "an older interpreter"])
def test_triton_launches_what_it_does_not_let_us_keep(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compiled before the launch all the same, where there is anything to compile."""
    function, x = Function(), torch.zeros(8)
    kernel = Kernel(function, 4, BLOCK=8, LAST=True)
    monkeypatch.setattr(launch, "_KEEPS", kind != "an older version")  # before 3.3
    if kind == "the interpreter":
        monkeypatch.setattr(Function, "warmup", lambda self, *_, **__: None)
    elif kind == "an older interpreter":  # before 3.6
        monkeypatch.delattr(Function, "warmup")
    starts = [kernel.bind(1, x, 16, x) for _ in range(2)]
    compiled = len(function.asked)
    assert compiled == (kind == "an older version")
    for start in starts:
        start()
    assert len(function.asked) == compiled + 2
    assert not function.direct


def test_tensors_live_until_they_are_launched_by_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_KEEPS", True)
    function, tensors = Function(), [torch.zeros(8), torch.zeros(8)]
    gone = [weakref.ref(t) for t in tensors]
    start = Kernel(function, 4, BLOCK=8, LAST=True).bind(1, tensors[0], 16, tensors[1])
    tensors.clear()
    function.asked.clear()
    start()
    assert all(t() is not None for t in gone)
    del start
    assert all(t() is None for t in gone)


def test_pinned_memory_is_not_launched_by_address() -> None:
    """Its address on the device may be another, which the launcher asks the driver for."""

    def tensor(device: int) -> Any:
        return SimpleNamespace(get_device=lambda: device, dtype=torch.int64, data_ptr=lambda: 64)

    report = tensor(-1)
    assert form_and_words((tensor(0), report, 1, None))[1] == [64, report, 1, None]


def test_forms() -> None:
    memory = torch.zeros(8, dtype=torch.int32)

    def form_of(argument: Any) -> Any:
        return form_and_words((memory, argument))[0]

    assert form_of(memory) == form_of(memory[4:]) != form_of(memory[1:])
    assert form_of(memory) != form_of(memory[2:]), "8 bytes are not enough"
    assert form_of(memory) != form_of(memory.long())
    assert form_and_words((memory, None, memory))[0] != form_and_words((memory, memory, None))[0]
    assert len({form_of(n) for n in (1, 2, 16, 2**31, 2**31 + 1)}) == 5
    assert form_of(2) == form_of(3) == form_of(2**31 - 1) != form_of(None)


DRIVER = """
import ctypes
import os
import sys

import torch
import triton

driver = ctypes.CDLL(os.path.join(os.environ["TRITON_LIBCUDA_PATH"], "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
try:
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class Device(CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_device_capability = lambda device: (9, 0)
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

    triton.runtime.driver.set_active(Device())
except Exception as error:
    if tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9):
        raise
    print(f"triton {triton.__version__} asks more of a driver: {error}")
    sys.exit(77)

from adagrad.kernels import cuda
from adagrad.kernels.cuda import launch
from adagrad.rule import Rule

launched = []
bind = launch.Kernel.bind_known

def observed(self, programs, arguments, *others):
    known = len(self._compiled)
    start = bind(self, programs, arguments, *others)
    is_known = len(self._compiled) == known
    return lambda: watched(start, self, programs, arguments, is_known)

def watched(start, self, programs, arguments, is_known):
    folded = [type(a) is int and a == 1 and not p.do_not_specialize for a, p in zip(arguments, self._function.params)]
    given = [a for a, is_folded in zip(arguments, folded) if a is not None and not is_folded]  # 1: not an argument
    before = ctypes.c_int.in_dll(driver, "launches").value
    ctypes.c_int.in_dll(driver, "arguments").value = len(given)
    start()
    words = (ctypes.c_ulonglong * 64).in_dll(driver, "words")
    got = [word % 2**32 if type(a) is int else word for a, word in zip(given, words)]
    expected = [a if type(a) is int else a.data_ptr() for a in given]
    assert ctypes.c_int.in_dll(driver, "launches").value == before + 1
    assert ctypes.c_uint.in_dll(driver, "programs").value == programs
    assert got == expected, (got, expected)
    launched.append((self._function.fn.__name__, is_known))

launch.Kernel.bind_known = observed

def step(row_wise, tables, found_inf):
    weight, values, table = torch.zeros(9, 48), torch.zeros(300, 48), torch.zeros(900, 48)
    history, sums = (torch.zeros(len(w), 1 if row_wise else 48) for w in (weight, table))
    rule, ids = Rule(row_wise=row_wise), torch.arange(300)
    dense = cuda.dense.of_tensors(weight, weight.clone(), history, None, 0.1, 0.1, rule)
    rows = [cuda.row_launches.of_tensors(table, ids, values, sums, None, 0.1, 0.1, rule)] * tables
    group = cuda.Group(rule, dense, cuda.row_launches.concatenate(rows))
    cuda.job([group], weight.device, found_inf=found_inf)()

for row_wise, tables, found_inf in (False, 1, None), (False, 2, None), (True, 1, torch.zeros(())):
    launched.clear()
    step(row_wise, tables, found_inf)
    first = ["check_ids" if tables == 1 else "check_ids_of_all", "sort_keys"]
    first.append("update_rows" if row_wise else "update_elements")
    names = [*first, "update_runs", "update_runs"]
    assert [name for name, _ in launched] == names, launched
    assert not any(known for _, known in launched[len(first):]) or not launch._KEEPS, launched
    for _ in range(2):
        step(row_wise, tables, found_inf)
    assert all(known for _, known in launched[len(names):]) or not launch._KEEPS, launched
"""


def test_what_arrives_at_the_driver(tmp_path: Path) -> None:
    """Kernels compiled for a GPU get the same arguments by Triton's launch and by ours."""
    if shutil.which("gcc") is None or not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip(reason="no gcc or no Python.h, which Triton needs to launch")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library, source = tmp_path / "libcuda.so.1", Path(__file__).parent / "cuda_driver.c"
    subprocess.run(["gcc", "-shared", "-fPIC", f"-I{include}", "-o", library, source], check=True)
    (tmp_path / "libcuda.so").symlink_to(library)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = {"TRITON_LIBCUDA_PATH": tmp_path, "TRITON_CACHE_DIR": tmp_path / "cache"}
    environment |= {name: str(path) for name, path in paths.items()}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    environment["LD_LIBRARY_PATH"] = os.pathsep.join([str(tmp_path), environment.get("LD_LIBRARY_PATH", "")])
    done = subprocess.run([sys.executable, "-c", DRIVER], env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip(reason=done.stdout.strip())
    assert done.returncode == 0, done.stderr[-2000:]


def test_each_device_has_compiled_kernels_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_KEEPS", True)
    function = Function()
    kernel = Kernel(function, 4, BLOCK=8, LAST=True)
    for index, asked in ((0, 1), (1, 2), (0, 2), (1, 2)):
        x = SimpleNamespace(get_device=lambda: index, dtype=torch.float32, data_ptr=lambda: 64)  # noqa: B023
        kernel.launch(1, x, 16, None)  # type: ignore[arg-type]
        assert len(function.asked) == asked


def test_a_kernel_that_is_still_being_compiled_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's FutureKernel cannot be launched, and what fails should fail before anything is."""

    class Slow(Function):
        def warmup(self, *arguments: Any, grid: Any, **constants: Any) -> Any:
            return SimpleNamespace(result=lambda: super(Slow, self).warmup(*arguments, grid=grid, **constants))

    monkeypatch.setattr(launch, "_KEEPS", True)
    function, x = Slow(), torch.zeros(8)
    kernel = Kernel(function, 4, BLOCK=8, LAST=True)
    kernel.launch(1, x, 16, x)
    kernel.launch(1, x, 16, x)
    assert len(function.asked) == 1
    assert len(function.direct) == 2
