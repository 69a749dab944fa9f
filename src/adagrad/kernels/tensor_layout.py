"""Where the torch at hand keeps what tensors are: found by comparison with public attributes of a few tensors."""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from adagrad.arrays import tensor_format
from adagrad.kernels.layout import (
    CODES,
    CONTIGUOUS,
    COUNT,
    DELETE_HANDLE,
    DTYPE_AT,
    ELEMENT_FORMATS,
    FORMAT,
    GET_ADDRESS,
    GET_INDEX,
    HOLDER,
    INDICES_AT,
    KEYS_AT,
    KIND,
    NEW_HANDLE,
    ON_CPU,
    ON_CUDA,
    PARAMETER,
    PLACE,
    RANK,
    RANK_AT,
    SIZES,
    SPARSE,
    START,
    STRIDES,
    TENSOR,
    UNIT,
    VALUES_AT,
    look_once,
)
from adagrad.kernels.tensor_checks import PLAIN_TYPES

SEARCHED = 192
"""Bytes of a C++ tensor that are searched for its dispatch keys; it has more."""

SEARCHED_IN_SPARSE = 224
"""Bytes of a sparse one that are searched for its parts; it has more."""


def add_to(how: np.ndarray, *, with_cuda: bool) -> None:
    """Make a layout know tensors; where they are not laid out in a way that can be found, it knows none."""
    found = how.copy()
    try:
        # Tensors of a mode, as fake ones are, are laid out otherwise.
        with torch.inference_mode(False), torch._C.DisableTorchFunction(), _disable_current_modes():
            if _find(found, with_cuda):
                how[:] = found
                _find_parts(found)  # where that fails, other tensors are known nevertheless
                how[:] = found
    except (AttributeError, OSError, RuntimeError):
        return


def _find(how: np.ndarray, with_cuda: bool) -> bool:
    library = _library()
    base = torch.arange(24.0, device="cpu")
    plain = [
        base,
        torch.nn.Parameter(base.double().view(2, 3, 4)),
        base.half()[4:].view(4, 5).t(),
        base.bfloat16()[0],
        base.view(1, 2, 3, 1, 4)[..., 1:3],
        base.int().view(6, 4)[2:],
        base.long(),
    ]
    probes = [*plain, torch._neg_view(base), base.to("meta"), base.view(4, 6).to_sparse()]
    codes = {name: getattr(library, f"aoti_torch_dtype_{name}")() for name in ELEMENT_FORMATS}
    for what, name in ((GET_ADDRESS, "get_data_ptr"), (GET_INDEX, "get_device_index")):
        how[what] = _address_of(name)
    how[HOLDER] = _offset([(id(t), object.__sizeof__(t), t._cdata) for t in probes])
    how[KEYS_AT] = _offset([(t._cdata, SEARCHED, _keys_of(t)) for t in probes])
    how[RANK_AT] = _offset([(t._cdata, SEARCHED, t.ndim) for t in plain])
    how[DTYPE_AT] = _offset([(t._cdata, SEARCHED, codes[tensor_format(t)]) for t in plain], ctypes.c_uint16)
    how[ON_CPU], how[ON_CUDA] = _keys_of(base), _keys_of(torch.empty(0, device="cuda")) if with_cuda else 0
    how[CODES : CODES + len(codes)] = list(codes.values())
    how[TENSOR], how[PARAMETER] = map(id, PLAIN_TYPES)
    return all(_agrees(how, t) for t in probes)


def _find_parts(how: np.ndarray) -> None:
    """Where sparse COO tensors keep their values and indices."""
    for what, name in ((NEW_HANDLE, "new_tensor_handle"), (DELETE_HANDLE, "delete_tensor_object")):
        how[what] = _address_of(name)
    with torch.inference_mode():  # else what they give is not what they keep, but another view of the same memory
        probes = [_sparse(k) for k in range(3)]
        for at, part_of in ((VALUES_AT, torch.Tensor._values), (INDICES_AT, torch.Tensor._indices)):
            parts = [part_of(t) for t in probes]
            places = zip(probes, parts, strict=True)
            how[at] = _offset([(t._cdata, SEARCHED_IN_SPARSE, part._cdata) for t, part in places])
    usual = _sparse(0)  # gradients are no inference tensors: do they keep what they give in the same places?
    get_address = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(int(how[GET_ADDRESS]))
    for at, part in ((VALUES_AT, usual._values()), (INDICES_AT, usual._indices())):
        kept, start = usual._cdata + int(how[at]), ctypes.c_int64()
        keys = ctypes.c_int64.from_address(ctypes.c_int64.from_address(kept).value + int(how[KEYS_AT])).value
        if keys != how[ON_CPU] or get_address(kept, ctypes.byref(start)) or start.value != part.data_ptr():
            raise RuntimeError("a sparse tensor keeps other parts than it gives")
    how[SPARSE] = _keys_of(usual)


def _sparse(first: int) -> torch.Tensor:
    indices, values = torch.arange(first, first + 3, device="cpu")[None], torch.ones(3, 2, device="cpu")
    return torch.sparse_coo_tensor(indices, values, (9, 2), device="cpu", is_coalesced=True, check_invariants=False)


@functools.cache
def _library() -> ctypes.CDLL:
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))


def _address_of(name: str) -> int:
    """That of a C function which PyTorch exports for compiled models."""
    return ctypes.cast(getattr(_library(), f"aoti_torch_{name}"), ctypes.c_void_p).value or 0


def _keys_of(tensor: torch.Tensor) -> int:
    return ctypes.c_int64(torch._C._dispatch_keys(tensor).raw_repr()).value


def _offset(places: list[tuple[int, int, int]], unit: Any = ctypes.c_int64) -> int:
    """The one offset at which, for every (address, size, value), the number at address + offset is the value."""
    step = ctypes.sizeof(unit)
    offsets = set(range(8, max(size for _, size, _ in places), step))
    for address, size, value in places:
        numbers = (unit * (size // step)).from_address(address)
        offsets &= {step * i for i, number in enumerate(numbers) if number == value}
    if len(offsets) != 1:
        raise RuntimeError(f"tensors hold the value sought at offsets {sorted(offsets)}: must be one")
    return offsets.pop()


def _agrees(how: np.ndarray, tensor: torch.Tensor) -> bool:
    """Whether compiled code sees of ``tensor`` what Python sees."""
    plain = type(tensor) in PLAIN_TYPES and _keys_of(tensor) == how[ON_CPU]
    seen = look_once(tensor, how)
    if not plain or seen is None:
        return not plain and seen is None
    expected = {
        KIND: 1,
        PLACE: 0,
        FORMAT: ELEMENT_FORMATS.index(tensor_format(tensor)),
        RANK: tensor.ndim,
        UNIT: 1,
        CONTIGUOUS: tensor.is_contiguous(),
        START: tensor.data_ptr(),
        COUNT: tensor.numel(),
    }
    numbers = ctypes.c_int64 * tensor.ndim
    sizes, strides = (tuple(numbers.from_address(int(seen[what]))) for what in (SIZES, STRIDES))
    alike = all(seen[what] == value for what, value in expected.items())
    return alike and sizes == tensor.shape and strides == tensor.stride()
