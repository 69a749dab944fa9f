"""How much memory updates take, what happens when there is none, and that they stay within their arrays."""

from __future__ import annotations

import os
from typing import Any

import pytest

from processes import posix, run

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
@pytest.mark.parametrize("general", [False, True])
def test_without_memory_for_the_sums_nothing_else_changes_either(general: bool) -> None:
    """Neither dense gradients of the same call nor later row-sparse ones, nor any count, by either path."""
    pytest.importorskip("torch")
    code = f"""
        import re, resource
        from pathlib import Path
        import torch
        from adagrad.kernels.inspection import layout
        from adagrad.torch import Adagrad
        if {general}:
            layout.current_layout()[layout.SPARSE] = 0
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
