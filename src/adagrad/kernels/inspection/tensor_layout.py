"""The layout of the installed torch's tensors: found by comparison with public attributes of a few tensors."""

from __future__ import annotations

import ctypes
import functools
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from adagrad.arrays import tensor_format
from adagrad.kernels.inspection.layout import (
    CODES,
    CONTIGUOUS,
    COUNT,
    DELETE_HANDLE,
    DEVICE,
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
    RANK,
    RANK_AT,
    SIZES,
    SPARSE,
    START,
    STRIDES,
    TENSOR,
    UNIT,
    VALUES_AT,
    describe_once,
)
from adagrad.kernels.tensors.checks import PLAIN_TYPES

SEARCHED = 192
"""Bytes of a C++ tensor that are searched for dispatch keys, rank and dtype; it has more."""

SEARCHED_IN_SPARSE = 224
"""Bytes of a sparse one that are searched for its parts; it has more."""


def add_to(layout: np.ndarray, *, with_cuda: bool) -> None:
    """Add torch's tensors to ``layout``, in place; it is left without them if their layout cannot be found."""
    found = layout.copy()
    try:
        # Tensors made under a mode, such as fake ones, are laid out differently.
        with torch.inference_mode(False), torch._C.DisableTorchFunction(), _disable_current_modes():
            if _find(found, with_cuda):
                layout[:] = found
                _find_parts(found)  # if that fails, other tensors are known nevertheless
                layout[:] = found
    except (AttributeError, OSError, RuntimeError):
        return


def _find(layout: np.ndarray, with_cuda: bool) -> bool:
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
        layout[what] = _address_of(name)
    layout[HOLDER] = _offset([(id(t), object.__sizeof__(t), t._cdata) for t in probes])
    layout[KEYS_AT] = _offset([(t._cdata, SEARCHED, _keys_of(t)) for t in probes])
    layout[RANK_AT] = _offset([(t._cdata, SEARCHED, t.ndim) for t in plain])
    layout[DTYPE_AT] = _offset([(t._cdata, SEARCHED, codes[tensor_format(t)]) for t in plain], ctypes.c_uint16)
    layout[ON_CPU], layout[ON_CUDA] = _keys_of(base), _keys_of(torch.empty(0, device="cuda")) if with_cuda else 0
    layout[CODES : CODES + len(codes)] = list(codes.values())
    layout[TENSOR], layout[PARAMETER] = map(id, PLAIN_TYPES)
    return all(_agrees(layout, t) for t in probes)


def _find_parts(layout: np.ndarray) -> None:
    """Add where sparse COO tensors keep their values and indices; RuntimeError if that cannot be found."""
    for what, name in ((NEW_HANDLE, "new_tensor_handle"), (DELETE_HANDLE, "delete_tensor_object")):
        layout[what] = _address_of(name)
    with torch.inference_mode():  # else they return other views of the same memory, not the tensors they keep
        probes = [_sparse(k) for k in range(3)]
        for at, part_of in ((VALUES_AT, torch.Tensor._values), (INDICES_AT, torch.Tensor._indices)):
            parts = [part_of(t) for t in probes]
            places = zip(probes, parts, strict=True)
            layout[at] = _offset([(t._cdata, SEARCHED_IN_SPARSE, part._cdata) for t, part in places])
    usual = _sparse(0)  # gradients are not inference tensors: do the same offsets hold for them?
    get_address = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(int(layout[GET_ADDRESS]))
    for at, part in ((VALUES_AT, usual._values()), (INDICES_AT, usual._indices())):
        kept, start = usual._cdata + int(layout[at]), ctypes.c_int64()
        keys = ctypes.c_int64.from_address(ctypes.c_int64.from_address(kept).value + int(layout[KEYS_AT])).value
        if keys != layout[ON_CPU] or get_address(kept, ctypes.byref(start)) or start.value != part.data_ptr():
            raise RuntimeError("a sparse tensor keeps other parts than it gives")
    layout[SPARSE] = _keys_of(usual)


def _sparse(first: int) -> torch.Tensor:
    indices, values = torch.arange(first, first + 3, device="cpu")[None], torch.ones(3, 2, device="cpu")
    with warnings.catch_warnings():
        # PyTorch 2.11 warns whoever makes the first sparse tensor that it is not checked, even if that was asked for.
        warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled", UserWarning)
        return torch.sparse_coo_tensor(indices, values, (9, 2), device="cpu", is_coalesced=True, check_invariants=False)


@functools.cache
def _library() -> ctypes.CDLL:
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))


def _address_of(name: str) -> int:
    """The address of a C function that PyTorch exports for compiled models."""
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


def _agrees(layout: np.ndarray, tensor: torch.Tensor) -> bool:
    """Whether compiled code sees ``tensor`` as Python does."""
    plain = type(tensor) in PLAIN_TYPES and _keys_of(tensor) == layout[ON_CPU]
    info = describe_once(tensor, layout)
    if not plain or info is None:
        return not plain and info is None
    expected = {
        KIND: 1,
        DEVICE: 0,
        FORMAT: ELEMENT_FORMATS.index(tensor_format(tensor)),
        RANK: tensor.ndim,
        UNIT: 1,
        CONTIGUOUS: tensor.is_contiguous(),
        START: tensor.data_ptr(),
        COUNT: tensor.numel(),
    }
    numbers = ctypes.c_int64 * tensor.ndim
    sizes, strides = (tuple(numbers.from_address(int(info[what]))) for what in (SIZES, STRIDES))
    alike = all(info[what] == value for what, value in expected.items())
    return alike and sizes == tensor.shape and strides == tensor.stride()
