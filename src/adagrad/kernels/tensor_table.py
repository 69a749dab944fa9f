"""The address table of lists of torch tensors, built and checked by compiled code.

Asking 300 parameters, gradients and histories for dtype, shape, layout and address through Python costs several times
what updating them costs. Here compiled code asks PyTorch itself, through the C functions that it exports for compiled
models (``aoti_torch_get_data_ptr`` and its siblings, a stable interface). What that interface leaves open is found by
:func:`layout` at first use, by comparison with public attributes: where a tensor object keeps its C++ tensor, and where
that keeps its dispatch keys, the one word that tells plain memory on a device from sparse layouts, wrappers, negated
views and all else. Where the search fails (another interpreter, a new PyTorch), the ordinary way is taken, which is
slower and no less exact.

Only tensors of the exact types in ``PLAIN_TYPES`` pass; all else, and every error, is left to the ordinary way.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from adagrad.kernels.cpu_dense import COLUMNS, GRAD, HISTORY, MASTER, ROW, SIZE, WEIGHT
from adagrad.kernels.formats import load, pointer, store
from adagrad.kernels.ndarray_table import _disjoint, _item, _word, available
from adagrad.kernels.numba_jit import jit

Formats: TypeAlias = tuple[str, str, str, str | None]

FUNCTIONS = ("get_dtype", "get_dim", "get_sizes", "get_strides", "is_contiguous", "get_data_ptr", "get_device_index")
_DTYPE, _DIM, _SIZES, _STRIDES, _CONTIGUOUS, _ADDRESS, _INDEX = range(len(FUNCTIONS))

FORMATS = ("float16", "bfloat16", "float32", "float64")
FLOAT32, FLOAT64 = 2, 3
"""Positions in FORMATS; the first two are the low-precision ones."""

# What `_look` finds out about a tensor.
PLACE, FORMAT, RANK, SHAPE, STRIDES, DENSE, START, COUNT = range(8)

_single, _double = np.empty(0, np.float32), np.empty(0, np.float64)

# The digits of a row's code: place * 16 + gradient in float32 * 8 + master copy * 4 + format of the weight.
WITH_MASTER, WIDE_GRAD, PLACES = 4, 8, 16


@intrinsic
def _call(typing: Any, function: Any, tensor: Any, out: Any) -> Any:
    """Call the C function at an address, ``int function(tensor, void *out)``; 0 says that it worked."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.IntType(32), [word, word])
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1], args[2]])

    return types.int32(types.int64, types.int64, types.int64), generate


@jit(helper=True)
def _ask(function: int, tensor: int, out: Any) -> int:
    out[0] = 0
    return np.int64(out[0]) if _call(function, tensor, np.int64(out.ctypes.data)) == 0 else np.int64(-1)


@jit(helper=True)
def _look(tensor: int, words: Any, kinds: Any, keys: Any, dtypes: Any, out: Any, seen: Any) -> bool:
    """Fill ``seen``; False for anything but plain memory of a known format on the CPU or a CUDA device."""
    known = False
    for kind in kinds:
        known |= _word(tensor, 8) == kind
    if not known:
        return False
    functions, holder, key_set = words[: len(FUNCTIONS)], words[len(FUNCTIONS)], words[len(FUNCTIONS) + 1]
    tensor += holder
    key = _word(_word(tensor, 0), key_set)
    if key == keys[0]:
        seen[PLACE] = 0
    elif key == keys[1]:
        if _call(functions[_INDEX], tensor, np.int64(out.ctypes.data)) != 0:
            return False
        seen[PLACE] = 1 + (out[0] & 0x7FFFFFFF)
    else:
        return False
    dtype = _ask(functions[_DTYPE], tensor, out)
    seen[FORMAT] = -1
    for i in range(len(dtypes)):
        if dtypes[i] == dtype:
            seen[FORMAT] = i
    seen[RANK] = _ask(functions[_DIM], tensor, out)
    seen[SHAPE] = _ask(functions[_SIZES], tensor, out)
    seen[DENSE] = _ask(functions[_CONTIGUOUS], tensor, out) & 0xFF
    seen[START] = _ask(functions[_ADDRESS], tensor, out)
    if seen[FORMAT] < 0 or seen[RANK] < 0:
        return False
    seen[COUNT] = 1
    for d in range(seen[RANK]):
        seen[COUNT] *= _word(seen[SHAPE], 8 * d)
    seen[STRIDES] = 0 if seen[DENSE] == 1 else _ask(functions[_STRIDES], tensor, out)
    itemsize = 2 if seen[FORMAT] < FLOAT32 else 4 if seen[FORMAT] == FLOAT32 else 8
    return seen[COUNT] == 0 or (seen[START] != 0 and seen[START] % itemsize == 0)


@jit(helper=True)
def _same_shape(a: Any, b: Any, row_wise: bool) -> bool:
    """Whether ``b`` has the shape of ``a``, or of its row-wise history."""
    same = a[RANK] == b[RANK]
    for d in range(a[RANK] if same else 0):
        same &= _word(b[SHAPE], 8 * d) == (1 if row_wise and d > 0 else _word(a[SHAPE], 8 * d))
    return same


@jit(helper=True)
def _same_order(a: Any, b: Any) -> bool:
    """Whether the elements of two tensors of one shape lie in the same order, with no gaps."""
    if a[DENSE] != b[DENSE]:
        return False
    for d in range(0 if a[DENSE] == 1 else a[RANK]):
        if _word(a[STRIDES], 8 * d) != _word(b[STRIDES], 8 * d):
            return False
    return True


@jit(helper=True)
def _has_no_gaps(a: Any) -> bool:
    """Whether some order of the dimensions makes the tensor contiguous (channels last, transposed, ...)."""
    if a[DENSE] == 1:
        return True
    reach = 1
    for _ in range(a[RANK]):
        if reach == a[COUNT]:
            break
        before = reach
        for d in range(a[RANK]):
            if _word(a[STRIDES], 8 * d) == reach and _word(a[SHAPE], 8 * d) > 1:
                reach *= _word(a[SHAPE], 8 * d)
                break
        if reach == before:
            return False
    return reach == a[COUNT]


@jit(helper=True)
def _code(w: Any, g: Any, h: Any, m: Any, has_master: bool, row_wise: bool) -> int:
    """The code of a weight whose four tensors fit together, else -1."""
    low = w[FORMAT] < FLOAT32
    computing = FLOAT32 if low else w[FORMAT]
    if g[PLACE] != w[PLACE] or h[PLACE] != w[PLACE] or h[FORMAT] != computing:
        return -1
    if g[FORMAT] != w[FORMAT] and not (low and g[FORMAT] == FLOAT32):
        return -1
    if not _same_shape(w, g, False) or not _same_shape(w, h, row_wise):
        return -1
    if row_wise:
        if w[RANK] == 0 or w[DENSE] != 1 or g[DENSE] != 1 or h[DENSE] != 1:
            return -1
    elif not (_same_order(w, g) and _same_order(w, h) and _has_no_gaps(w)):
        return -1
    code = w[PLACE] * PLACES + w[FORMAT]
    if has_master:
        if not low or m[PLACE] != w[PLACE] or m[FORMAT] != FLOAT32:
            return -1
        if not _same_shape(w, m, False) or not _same_order(w, m):
            return -1
        code += WITH_MASTER
    if g[FORMAT] != w[FORMAT]:
        code += WIDE_GRAD
    return code


@jit()
def fill(lists: Any, words: Any, kinds: Any, none: int, keys: Any, dtypes: Any, row_wise: bool, table: Any,
         codes: Any, starts: Any, ends: Any) -> Any:  # fmt: skip
    """Fill ``table``, the ``codes`` of its rows and the spans of memory, from four lists, given by ``id``.

    Returns the code that all rows share (-1 if they do not) and the number of elements.

    Row ``i`` is for the ``i``-th weight, gradient, history and, if there is such a list, master copy or None. Codes
    are -1, and spans empty, where the row is left to the ordinary way. ``starts`` and ``ends``: weights, histories,
    master copies if there is such a list, gradients.
    """
    n = len(table)
    last = len(starts) - n
    total = 0
    out = np.empty(1, np.int64)
    w, g, h, m = np.zeros(8, np.int64), np.zeros(8, np.int64), np.zeros(8, np.int64), np.zeros(8, np.int64)
    for i in range(n):
        codes[i] = -1
        table[i] = 0
        for at in range(i, len(starts), n):
            starts[at], ends[at] = 0, 0
        master = _item(lists[MASTER], i) if lists[MASTER] else none
        has_master = master != none
        if not _look(_item(lists[WEIGHT], i), words, kinds, keys, dtypes, out, w):
            continue
        if not _look(_item(lists[GRAD], i), words, kinds, keys, dtypes, out, g):
            continue
        if not _look(_item(lists[HISTORY], i), words, kinds, keys, dtypes, out, h):
            continue
        if has_master and not _look(master, words, kinds, keys, dtypes, out, m):
            continue
        codes[i] = _code(w, g, h, m, has_master, row_wise)
        if codes[i] < 0:
            continue
        table[i, WEIGHT], table[i, GRAD], table[i, HISTORY] = w[START], g[START], h[START]
        table[i, MASTER] = m[START] if has_master else 0
        table[i, SIZE] = w[COUNT]
        total += w[COUNT]
        if row_wise and w[COUNT]:
            table[i, ROW] = w[COUNT] // _word(w[SHAPE], 0)
        own, wide = 2 if w[FORMAT] < FLOAT32 else 4, 4
        if w[FORMAT] == FLOAT64:
            own, wide = 8, 8
        starts[i], ends[i] = w[START], w[START] + own * w[COUNT]
        starts[n + i], ends[n + i] = h[START], h[START] + wide * h[COUNT]
        if has_master:
            starts[2 * n + i], ends[2 * n + i] = m[START], m[START] + wide * w[COUNT]
        starts[last + i] = g[START]
        ends[last + i] = g[START] + (own if g[FORMAT] == w[FORMAT] else wide) * w[COUNT]
    same = codes[0]
    for i in range(n):
        same = same if codes[i] == same else -1
    return same, total


@jit()
def look(tensor: int, words: Any, kinds: Any, keys: Any, dtypes: Any, seen: Any) -> bool:
    """What compiled code sees of one tensor, for :func:`layout`."""
    return _look(tensor, words, kinds, keys, dtypes, np.empty(1, np.int64), seen)


@jit()
def disjoint(starts: Any, ends: Any, written: int, order: Any) -> bool:
    """Whether the first ``written`` spans share no byte with any other; ``order`` is a guess at their order."""
    return _disjoint(starts, ends, written, order)


@jit()
def read_counts(counts: int, words: Any, kinds: Any, keys: Any, dtypes: Any, addresses: Any, values: Any) -> bool:
    """The addresses and values of a list of counts; False unless all are plain one-element tensors on the CPU.

    The address of a float64 is made negative.
    """
    out, seen = np.empty(1, np.int64), np.zeros(8, np.int64)
    for i in range(len(addresses)):
        if not _look(_item(counts, i), words, kinds, keys, dtypes, out, seen):
            return False
        if seen[PLACE] != 0 or seen[COUNT] != 1 or seen[FORMAT] < FLOAT32:
            return False
        if seen[FORMAT] == FLOAT32:
            addresses[i], values[i] = seen[START], np.float64(load(pointer(seen[START], _single, "history"), 0))
        else:
            addresses[i], values[i] = -seen[START], load(pointer(seen[START], _double, "history"), 0)
    return True


@jit()
def increment(addresses: Any) -> None:
    """Add 1 to each of the counts at the addresses that :func:`read_counts` gave."""
    for address in addresses:
        if address > 0:
            single = pointer(address, _single, "history")
            store(single, 0, load(single, 0) + np.float32(1))
        else:
            double = pointer(-address, _double, "history")
            store(double, 0, load(double, 0) + 1.0)


class Table(NamedTuple):
    """Lists of tensors as the kernels want them."""

    rows: np.ndarray
    """(n, COLUMNS), as :mod:`adagrad.kernels.cpu_dense` has it."""
    codes: np.ndarray
    """Which rows go together; -1 for those that are left to the ordinary way. See :func:`formats`."""
    common: int
    """The code of all rows, or -1."""
    total: int
    """Elements in all rows."""
    starts: np.ndarray
    """Where the rows' memory begins: what is written to, then what is read."""
    ends: np.ndarray
    written: int
    """How many of the spans are written to."""


def table(weights: list[Any], grads: list[Any], histories: list[Any], masters: list[Any], row_wise: bool) -> Table:
    """See :class:`Table`; ``masters`` may be empty or hold None. The lists must be kept, unchanged, while the table is in use."""
    n = len(weights)
    columns = 4 if masters else 3
    rows, codes = np.empty((n, COLUMNS), np.int64), np.empty(n, np.int64)
    starts, ends = np.empty((2, columns * n), np.int64)
    found = layout()
    if found is None or n == 0:
        codes[:], starts[:], ends[:] = -1, 0, 0
        return Table(rows, codes, -1, 0, starts, ends, (columns - 1) * n)
    lists = np.array([id(weights), id(grads), id(histories), id(masters) if masters else 0])
    common, total = fill(lists, found.words, found.kinds, id(None), _known_keys(), found.dtypes, row_wise,
                         rows, codes, starts, ends)  # fmt: skip
    return Table(rows, codes, common, total, starts, ends, (columns - 1) * n)


def are_disjoint(starts: np.ndarray, ends: np.ndarray, written: int) -> bool:
    """Whether the first ``written`` spans share no byte with any other span."""
    return bool(disjoint(starts, ends, written, _order(len(starts))))


@functools.lru_cache(maxsize=64)
def _order(spans: int) -> np.ndarray:
    return np.arange(spans)


@functools.lru_cache(maxsize=256)
def formats(code: int) -> tuple[int, Formats]:
    """What a code says: the place (0 for the CPU, 1 + index of a CUDA device) and the formats."""
    place, digits = divmod(code, PLACES)
    weight = FORMATS[digits % WITH_MASTER]
    computing = "float64" if weight == "float64" else "float32"
    grad = "float32" if digits & WIDE_GRAD else weight
    return place, (weight, grad, computing, "float32" if digits & WITH_MASTER else None)


def _known_keys() -> np.ndarray:
    # Before CUDA is initialized there is no CUDA tensor, and asking would initialize it.
    return _keys_with_cuda() if torch.cuda.is_initialized() else _keys_without_cuda()


@functools.cache
def _keys_with_cuda() -> np.ndarray:
    return np.array([keys("cpu"), keys("cuda")], np.int64)


@functools.cache
def _keys_without_cuda() -> np.ndarray:
    return np.array([keys("cpu"), 0], np.int64)


# ------------------------------------------------------------------------------------- where PyTorch keeps things


class Layout(NamedTuple):
    """What the compiled code must know of the PyTorch at hand."""

    words: np.ndarray
    """The addresses of FUNCTIONS; where a tensor object keeps its C++ tensor, and that its dispatch keys."""
    kinds: np.ndarray
    """The addresses of the types whose objects are plain tensors."""
    dtypes: np.ndarray
    """What ``get_dtype`` says of FORMATS."""


PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
"""The types whose objects are their memory and nothing else (a buffer is a Tensor)."""


@functools.cache
def keys(device_type: str) -> int:
    """The dispatch keys of plain memory on a device."""
    with torch.inference_mode(False):
        return int(torch._C._dispatch_keys(torch.empty(0, device=device_type)).raw_repr())


@functools.cache
def layout() -> Layout | None:
    """How to read tensors, found by comparison with what Python says of a few; None where that fails."""
    try:
        with torch.inference_mode(False):
            return _layout()
    except (AttributeError, OSError, RuntimeError):
        return None


def _layout() -> Layout | None:
    if platform.python_implementation() != "CPython" or not available():
        return None
    library = _library()
    functions = [getattr(library, f"aoti_torch_{name}") for name in FUNCTIONS]
    dtypes = [getattr(library, f"aoti_torch_dtype_{name}")() for name in FORMATS]
    base = torch.arange(24.0)
    probes = [
        base,
        torch.nn.Parameter(base.double().view(2, 3, 4)),
        base.half()[4:].view(4, 5).t(),
        torch.zeros((), dtype=torch.bfloat16),
        torch._neg_view(base),
        torch.empty(2, 3, device="meta"),
        torch.zeros(2, 2).to_sparse(),
    ]
    holder = _find([(id(t), object.__sizeof__(t), t._cdata) for t in probes])
    # The first 128 bytes are within the smallest of the C++ objects.
    key_set = _find([(t._cdata, C_TENSOR, torch._C._dispatch_keys(t).raw_repr()) for t in probes])
    if holder is None or key_set is None:
        return None
    addresses = [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions]
    found = Layout(
        np.array([*addresses, holder, key_set], np.int64),
        np.array([id(kind) for kind in PLAIN_TYPES], np.int64),
        np.array(dtypes, np.int64),
    )
    return found if _agrees(found, probes) else None


C_TENSOR = 192
"""Bytes of a C++ tensor object that are searched; it has more."""


def _library() -> ctypes.CDLL:
    folder = Path(torch.__file__).parent / "lib"
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    return ctypes.CDLL(str(folder / name))


def _find(places: list[tuple[int, int, int]]) -> int | None:
    """The one offset at which, for every (address, size, value), the word at address + offset is the value."""
    offsets = set(range(8, C_TENSOR, 8))
    for address, size, value in places:
        words = (ctypes.c_uint64 * (size // 8)).from_address(address)
        offsets &= {8 * i for i in range(size // 8) if words[i] == value}
    return offsets.pop() if len(offsets) == 1 else None


def _agrees(found: Layout, probes: list[torch.Tensor]) -> bool:
    """Whether the compiled code sees of ``probes`` what Python sees."""
    known = _keys_without_cuda()
    for tensor in probes:
        seen = np.zeros(8, np.int64)
        plain = type(tensor) in PLAIN_TYPES and torch._C._dispatch_keys(tensor).raw_repr() == known[0]
        if look(id(tensor), found.words, found.kinds, known, found.dtypes, seen) != plain:
            return False
        if plain:
            expected = {
                PLACE: 0,
                FORMAT: FORMATS.index(str(tensor.dtype).removeprefix("torch.")),
                RANK: tensor.ndim,
                DENSE: tensor.is_contiguous(),
                START: tensor.data_ptr(),
                COUNT: tensor.numel(),
            }
            if any(seen[what] != value for what, value in expected.items()):
                return False
            for what, values in ((SHAPE, tensor.shape), (STRIDES, tensor.stride())):
                if seen[what] and list((ctypes.c_int64 * tensor.ndim).from_address(int(seen[what]))) != list(values):
                    return False
    return True
