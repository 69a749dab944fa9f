"""The library's own state files: safetensors with checksums that detect every altered byte. No pickle, ever.

``write`` and ``read`` convert a dict of states to a file and back, ``encode`` to bytes. A state is an array, None, or a
tuple or list of states.

The file is plain safetensors (8 bytes of header length, a JSON header, the arrays' little-endian bytes), so any
safetensors reader can open it. Everything else is in its metadata, whose values are strings:

    format, version  "adagrad-states" and the version of this layout
    header           JSON: "states" as [key, structure] pairs (0 and "0" are different keys; a structure is null, the
                     number of a tensor, or {"tuple": [...]} or {"list": [...]}), "tensors" as [name, CRC-32] pairs,
                     and "optimizer", null or a dict in which floats are hexadecimal (exact, infinities included)
    crc32            CRC-32 of everything before it: the length, the tensor table, all of the above

A tensor's CRC-32 covers its dtype and shape, then its bytes. The safetensors package is not used: its functions hold
two more copies of the data, and drop the metadata when reading from bytes.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import numbers
import os
import re
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from adagrad import checks
from adagrad.arrays import operand

State: TypeAlias = "NDArray[Any] | tuple[State, ...] | list[State] | None"

_FORMAT = "adagrad-states"
_VERSION = 1
_CODES = {"float16": "F16", "float32": "F32", "float64": "F64", "bfloat16": "BF16"}
_MEMORY = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2"}  # NumPy has no bfloat16: its bit pattern
_DEPTH = 16  # most levels of nested states and hyper-parameters: more than any has, and safe to recurse into
_CRC = re.compile(rb'"([0-9a-f]{8})"\}\} *')  # how a header ends


# ---------------------------------------------------------------------------------------------------------------- write


def encode(states: Mapping[int | str, Any], optimizer: Mapping[str, Any] | None) -> bytes:
    """Return what :func:`write` writes."""
    file = io.BytesIO()
    write(file, states, optimizer)
    return file.getvalue()


def write(file: IO[bytes], states: Mapping[int | str, Any], optimizer: Mapping[str, Any] | None) -> None:
    """Write ``states``, with the hyper-parameters and counts in ``optimizer`` unless that is None, to an empty file.

    Arrays are NumPy arrays or torch tensors on any device: float16, bfloat16, float32 or float64, of any strides and
    byte order. ``optimizer`` contains None, bools, numbers, strings, and lists, tuples and dicts of them, with int or
    str keys. TypeError for anything else. At most one array at a time is copied.
    """
    leaves: list[tuple[str, Any]] = []
    keyed = [(_key(key), state) for key, state in states.items()]
    table = [[key, _outline(state, json.dumps(key), leaves)] for key, state in keyed]
    packed = None if optimizer is None else _pack(dict(optimizer))
    tensors: dict[str, Any] = {}
    end = 0
    for name, leaf in leaves:
        found = operand(f"state {name}", leaf)
        code, begin = _CODES[found.format], end
        end += math.prod(found.shape) * np.dtype(_MEMORY[code]).itemsize
        tensors[name] = {"dtype": code, "shape": list(found.shape), "data_offsets": [begin, end]}

    def header(checksums: list[str]) -> bytes:
        inner = {"states": table, "tensors": list(zip(tensors, checksums, strict=True)), "optimizer": packed}
        return _header(tensors, json.dumps(inner, separators=(",", ":")))

    # Checksums have a fixed width, so the header's length is known before them, and one pass over the arrays suffices.
    # Its size at once keeps a file in memory from growing, which would copy it.
    checksums = ["0" * 8] * len(leaves)
    start = len(header(checksums))
    file.seek(start + end - 1)
    file.write(b"\0")
    file.seek(start)
    for number, (name, leaf) in enumerate(leaves):
        raw = _raw(name, leaf)
        checksums[number] = _checksum(tensors[name], raw)
        file.write(raw.data)
    file.seek(0)
    file.write(header(checksums))


def _key(key: Any) -> int | str:
    if isinstance(key, bool) or not isinstance(key, (numbers.Integral, str)):
        raise TypeError(f"states: a key of type {type(key).__name__}: keys must be int or str")
    if isinstance(key, str):
        return key
    if not -(2**63) <= int(key) < 2**63:
        raise ValueError(f"states: key {key}: must fit 64 bits")
    return int(key)


def _outline(state: Any, name: str, leaves: list[tuple[str, Any]], depth: int = 0) -> Any:
    """Return the structure of ``state`` as JSON; its arrays are appended to ``leaves``."""
    if state is None:
        return None
    if not isinstance(state, (tuple, list)):
        leaves.append((name, state))
        return len(leaves) - 1
    if depth == _DEPTH:
        raise ValueError(f"state {name}: nested deeper than {_DEPTH}")
    parts = [_outline(part, f"{name}/{number}", leaves, depth + 1) for number, part in enumerate(state)]
    return {"tuple" if isinstance(state, tuple) else "list": parts}


def _raw(name: str, leaf: Any) -> NDArray[np.uint8]:
    """Return the bytes of an array, in C order and little-endian; copied only if they are not so already."""
    found = operand(f"state {name}", leaf)
    if found.memory is None:
        found = operand(f"state {name}", found.array.cpu())
    memory: NDArray[Any] = np.asarray(found.memory)
    return memory.astype(memory.dtype.newbyteorder("<"), order="C", copy=False).reshape(-1).view(np.uint8)


def _checksum(entry: Mapping[str, Any], raw: Any) -> str:
    return f"{zlib.crc32(raw, zlib.crc32(json.dumps([entry['dtype'], entry['shape']]).encode())):08x}"


def _header(tensors: Mapping[str, Any], inner: str) -> bytes:
    """Return the length and the JSON header, padded so that the arrays start at a multiple of 8 (for safetensors)."""
    metadata = {"format": _FORMAT, "version": str(_VERSION), "header": inner, "crc32": "0" * 8}
    text = json.dumps({**tensors, "__metadata__": metadata}, separators=(",", ":")).encode()
    prefixed = struct.pack("<Q", len(text) + -len(text) % 8) + text
    covered = prefixed[: -len('00000000"}}')]
    return covered + f'{zlib.crc32(covered):08x}"}}}}'.encode() + b" " * (-len(text) % 8)


def _pack(value: Any, depth: int = 0) -> Any:
    """Return ``value`` as JSON, from which ``_unpack`` restores the same types and bits."""
    value = value.item() if isinstance(value, np.generic) else checks.unpacked(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return {"float": value.hex()}
    if depth == _DEPTH:
        raise ValueError(f"optimizer: nested deeper than {_DEPTH}")
    if isinstance(value, Mapping):
        return {"dict": [[_key(key), _pack(part, depth + 1)] for key, part in value.items()]}
    if isinstance(value, (tuple, list)):
        parts = [_pack(part, depth + 1) for part in value]
        return {"tuple": parts} if isinstance(value, tuple) else parts
    raise TypeError(f"optimizer: a value of type {type(value).__name__} cannot be saved")


# ----------------------------------------------------------------------------------------------------------------- read


def read(file: IO[bytes]) -> tuple[dict[int | str, State], dict[str, Any] | None]:
    """Return the states and the optimizer's dict, or None, that :func:`write` wrote to a file.

    Arrays are new, writable, C-contiguous and in native byte order. bfloat16 arrays have ml_dtypes' dtype if that is
    installed, else float32, with the same values. ValueError, with the reason, if the file is truncated, altered or
    something else. No more is allocated than it is long enough to fill.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(8)
    (length,) = struct.unpack("<Q", start) if len(start) == 8 else (0,)
    if length < 2:
        raise _refusal("it does not start as a safetensors file")
    if length > size - 8:
        raise _refusal(f"truncated, or not a safetensors file: {length} bytes of header, {size - 8} bytes left")
    head, size = start + file.read(length), size - 8 - length
    tensors = _object(head[8:], "the header")
    metadata = tensors.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
        raise _refusal("safetensors, but not written by this library")
    version = metadata.get("version")
    if not isinstance(version, str) or not re.fullmatch("[1-9][0-9]{0,8}", version):
        raise _refusal("the format version is not a number")
    if int(version) > _VERSION:
        raise _refusal(f"format version {version}: this library reads up to {_VERSION}")
    end = _CRC.fullmatch(head, head.rfind(b'"', 0, head.rfind(b'"')))
    if end is None or int(end[1], 16) != zlib.crc32(head[: end.start(1)]):
        raise _refusal("the header is damaged: its CRC-32 differs")

    inner = _object(metadata.get("header"), "the inner header")
    listed = _list(inner.get("tensors"), "the list of tensors")
    pairs = [_pair(pair, str, "a tensor") for pair in listed]
    if len(dict(pairs)) != len(pairs) or tensors.keys() != dict(pairs).keys():
        raise _refusal("the tensors in it are not the ones that its header lists")
    arrays: list[State] = []
    at = 0
    for name, checksum in pairs:
        array, at = _array(name, tensors[name], file, size, at, checksum)
        arrays.append(array)
    if at != size:
        raise _refusal(f"{size - at} bytes too many after the last tensor")

    states: dict[int | str, State] = {}
    unused = dict(enumerate(arrays))
    for entry in _list(inner.get("states"), "the list of states"):
        key, structure = _pair(entry, (int, str), "a state")
        if key in states:
            raise _refusal(f"state {key!r} occurs twice")
        states[key] = _assemble(structure, unused)
    if unused:
        raise _refusal("a tensor belongs to no state")
    optimizer = None if inner.get("optimizer") is None else _unpack(inner["optimizer"])
    if optimizer is not None and not isinstance(optimizer, dict):
        raise _refusal("the optimizer is not a dict")
    return states, optimizer


def _refusal(reason: str) -> ValueError:
    return ValueError(f"not a state file that can be read: {reason}")


def _object(text: Any, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise _refusal(f"{what} is not JSON") from error
    if not isinstance(value, dict):
        raise _refusal(f"{what} is not a JSON object")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise _refusal(f"{what} is missing")
    return value


def _pair(value: Any, first: type | tuple[type, ...], what: str) -> tuple[Any, Any]:
    pair = _list(value, what)
    if len(pair) != 2 or isinstance(pair[0], bool) or not isinstance(pair[0], first):
        raise _refusal(f"{what} is listed in an unknown form")
    if isinstance(pair[0], int) and not -(2**63) <= pair[0] < 2**63:  # larger ones could be chosen to have one hash
        raise _refusal(f"{what} has a key outside of 64 bits")
    return pair[0], pair[1]


def _array(name: str, entry: Any, file: IO[bytes], size: int, begin: int, checksum: Any) -> tuple[NDArray[Any], int]:
    """Read the tensor ``name``, whose bytes must start at ``begin`` of ``size``; return it and where they end."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) or entry["dtype"] not in _MEMORY:
        raise _refusal(f"tensor {name}: its dtype is not one of {', '.join(_MEMORY)}")
    memory = np.dtype(_MEMORY[entry["dtype"]])
    shape = _list(entry.get("shape"), f"tensor {name}: its shape")
    if len(shape) > 64 or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise _refusal(f"tensor {name}: its shape is not a list of valid sizes")
    end = begin + math.prod(shape) * memory.itemsize
    if entry.get("data_offsets") != [begin, end]:
        raise _refusal(f"tensor {name}: its place in the file does not agree with its shape")
    if end > size:
        raise _refusal(f"truncated: tensor {name} ends at byte {end} of the data, and there are {size}")
    try:
        array: NDArray[Any] = np.empty(shape, memory)
    except ValueError as error:  # more dimensions than NumPy supports, or sizes too large next to a zero
        raise _refusal(f"tensor {name}: {error}") from error
    raw = array.reshape(-1).view(np.uint8)
    if file.readinto(raw.data) != len(raw) or _checksum(entry, raw) != checksum:  # type: ignore[attr-defined]
        raise _refusal(f"tensor {name} is damaged: its CRC-32 differs")
    array = array.astype(memory.newbyteorder("="), copy=False)
    return (_bfloat16(array) if entry["dtype"] == "BF16" else array), end


def _bfloat16(bits: NDArray[np.uint16]) -> NDArray[Any]:
    try:
        return bits.view(importlib.import_module("ml_dtypes").bfloat16)
    except ImportError:
        return (bits.astype(np.uint32) << 16).view(np.float32)


def _assemble(structure: Any, unused: dict[int, State], depth: int = 0) -> State:
    """Return the state of this structure; removes its arrays from ``unused``."""
    if structure is None:
        return None
    if type(structure) is int and structure in unused:
        return unused.pop(structure)
    kind, parts = _tagged(structure, depth)
    if kind not in ("tuple", "list"):
        raise _refusal("a state has an unknown structure")
    made = [_assemble(part, unused, depth + 1) for part in parts]
    return tuple(made) if kind == "tuple" else made


def _unpack(value: Any, depth: int = 0) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, list):
        value = {"list": value}
    kind, parts = _tagged(value, depth)
    if kind == "float" and isinstance(value["float"], str):
        with contextlib.suppress(ValueError, OverflowError):
            return float.fromhex(value["float"])
    if kind == "dict":
        pairs = [_pair(part, (int, str), "a hyper-parameter") for part in parts]
        return {key: _unpack(part, depth + 1) for key, part in pairs}
    makers: dict[str, Callable[[list[Any]], Any]] = {"tuple": tuple, "list": list}
    if kind not in makers:
        raise _refusal("a hyper-parameter has an unknown form")
    return makers[kind]([_unpack(part, depth + 1) for part in parts])


def _tagged(value: Any, depth: int) -> tuple[str, list[Any]]:
    """Return the tag and the content of ``{tag: content}``."""
    if not isinstance(value, dict) or len(value) != 1 or (depth >= _DEPTH and "float" not in value):
        raise _refusal("its header has an unknown structure")
    ((tag, content),) = value.items()
    return tag, content if tag == "float" else _list(content, f"a {tag}")
