"""Read the pickles in which MXNet saves states, without executing them.

A pickle is a program. ``pickle.Unpickler`` with a restricted ``find_class`` would not suffice: it still allocates
whatever the program requests (a memo slot numbered two billion, 8 GB of bytes in a file of 20), and its calls happen in
code outside this library. So the forty opcodes that picklers of protocols 2 to 5 emit for such objects are interpreted
below, on plain data: a class is a name, calling a known one makes an inert record, and everything else is refused by
name. A new object of another class becomes an inert record, too, because a user-defined scheduler is saved with its
optimizer; anywhere else it is refused.

Memory stays within a small multiple of the file's size: strings and bytes are slices of it, memo slots are numbered in
sequence, containers are counted, no array's bytes are used twice, and rows that row-sparse arrays omit are filled in
only up to the length of the file.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from adagrad.mxnet_ndarray import Bytes, read_array

OPTIMIZERS = {
    "mxnet.optimizer.adagrad.AdaGrad": "AdaGrad",
    "mxnet.optimizer.optimizer.AdaGrad": "AdaGrad",  # of MXNet 1
    "mxnet.optimizer.contrib.GroupAdaGrad": "GroupAdaGrad",
}
SCHEDULERS = {
    f"mxnet.lr_scheduler.{name}": name
    for name in ("FactorScheduler", "MultiFactorScheduler", "PolyScheduler", "CosineScheduler")
}

_GLOBALS = {
    "mxnet.ndarray.ndarray.NDArray": "array",
    "mxnet.ndarray.sparse.RowSparseNDArray": "array",
    "mxnet.numpy.multiarray.ndarray": "array",
    "builtins.bytearray": "bytearray",
    "__builtin__.bytearray": "bytearray",  # its name in protocol 2, where bytes are encoded text
    "_codecs.encode": "encode",
    "collections.OrderedDict": "dict",
    "numpy.dtype": "dtype",
    "numpy.core.multiarray.scalar": "scalar",  # hyper-parameters that were NumPy numbers
    "numpy._core.multiarray.scalar": "scalar",
    **OPTIMIZERS,
    **SCHEDULERS,
}

_CLASSES = {*OPTIMIZERS.values(), *SCHEDULERS.values()}


def refusal(name: str) -> ValueError:
    return ValueError(f"refused {name[:200]!r}: not needed for AdaGrad's states")


def kind(value: Any) -> str:
    if isinstance(value, _Global):
        return value.kind
    return value.name if isinstance(value, Record) else type(value).__name__


@dataclass(frozen=True)
class _Global:
    kind: str


class Array:
    data: NDArray[Any] | None = None


class Record:
    """An optimizer or scheduler: the name of its class, and its attributes. The name of a class that is not listed
    above is qualified by its module."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.attributes: dict[int | str, Any] | None = None


def is_unknown(value: Any) -> bool:
    """Whether it is an object of an unknown class, or that class or function itself; all are inert."""
    return isinstance(value, (Record, _Global)) and "." in kind(value)


class _Dtype:
    def __init__(self, form: str) -> None:
        self.form = form


_SCALARS = {"f2": "e", "f4": "f", "f8": "d", "i1": "b", "i2": "h", "i4": "i", "i8": "q"}
_SCALARS |= {"b1": "?", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"}


class Machine:
    """Interpreter of the opcodes. ``stack``, ``marks`` and ``memo`` are those of the pickle machine."""

    def __init__(self, view: memoryview) -> None:
        self.code = Bytes(view)
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self.objects = 64 + len(view) // 8  # may still be made: an array needs 4, and 55 bytes besides its values
        self.spare = self.text = len(view)  # bytes left for absent rows, and for text that encodes bytes (protocol 2)

    def run(self) -> Any:
        if self.code.number("B") != 0x80 or not 2 <= self.code.number("B") <= 5:
            raise ValueError("it does not start as a pickle of protocol 2 to 5")
        while (opcode := chr(self.code.number("B"))) != ".":
            if opcode not in _OPCODES:
                names = {known.code: known.name for known in pickletools.opcodes}
                raise ValueError(f"refused opcode {names.get(opcode, hex(ord(opcode)))}")
            _OPCODES[opcode](self)
        if len(self.stack) != 1 or self.marks or self.code.at != len(self.code.view):
            raise ValueError("data is left over at its end")
        return self.stack[0]

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def make(self, value: Any) -> None:
        self.objects -= 1
        if self.objects < 0:
            raise ValueError("more objects than a file of this size needs")
        self.stack.append(value)

    def pop(self) -> Any:
        top = self.top()
        del self.stack[-1]
        return top

    def top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("an opcode lacks its operand")
        return self.stack[-1]

    def mark(self) -> None:
        self.make(None)
        self.marks.append(len(self.stack))

    def since_mark(self) -> list[Any]:
        if not self.marks:
            raise ValueError("an opcode lacks its mark")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start - 1 :]
        return items

    def tuple_of(self, size: int) -> None:
        items = [self.pop() for _ in range(size)]
        self.make(tuple(reversed(items)))

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            raise ValueError(f"appends to a {type(target).__name__}")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not dict or len(items) % 2:
            raise ValueError(f"sets {len(items) / 2} items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (int, str):
                raise ValueError(f"a key of type {type(key).__name__}: keys are int or str")
            if key in target:
                raise ValueError("a key occurs twice")
            target[key] = value

    def put(self, slot: int) -> None:
        if slot != len(self.memo):
            raise ValueError(f"memo slot {slot} out of sequence")
        self.memo.append(self.top())

    def get(self, slot: int) -> None:
        if slot >= len(self.memo):
            raise ValueError(f"memo slot {slot} is empty")
        self.push(self.memo[slot])

    def line(self) -> str:
        start = self.code.at
        text, newline, _ = bytes(self.code.view[start : start + 256]).partition(b"\n")
        self.code.take(len(text) + 1 if newline else 256)
        return text.decode()

    def frame(self) -> None:
        size = self.code.number("<Q")
        if size > len(self.code.view) - self.code.at:
            raise ValueError("truncated: it ends before its frame")

    def integer(self) -> None:
        size = self.code.number("B")
        if size > 8:
            raise ValueError(f"an integer of {size} bytes")
        self.push(int.from_bytes(self.code.take(size), "little", signed=True))

    def find(self, name: Any, module: Any) -> None:
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a class whose name is not text")
        if len(module) + len(name) > 200:  # it will be copied
            raise refusal(f"{module[:200]}.{name[:200]}")
        path = f"{module}.{name}"
        self.make(_Global(_GLOBALS.get(path, path)))

    def call(self, arguments: Any, function: Any) -> None:
        match getattr(function, "kind", None), arguments if type(arguments) is tuple else None:
            case "array", (None,):
                self.make(Array())
            case "bytearray", ():
                self.make(Bytes(memoryview(b"")))
            case "bytearray", (Bytes() as raw,):
                self.push(raw)
            case "bytearray" | "encode", (str() as text, "latin-1" | "latin1"):
                self.text -= len(text)
                if self.text < 0:
                    raise ValueError("two arrays share their bytes")
                self.make(Bytes(memoryview(text.encode("latin-1"))))
            case "dict", ():
                self.make({})
            case "dtype", (str() as code, False, True) if code in _SCALARS:
                self.make(_Dtype("<" + _SCALARS[code]))
            case "scalar", (_Dtype() as dtype, Bytes() as raw) if len(raw.view) == struct.calcsize(dtype.form):
                self.push(struct.unpack(dtype.form, raw.view)[0])
            case str() as path, _ if "." in path:
                raise refusal(path)
            case kind, _:
                raise ValueError(f"refused a call of {kind} with arguments that such a file does not have")

    def new(self, arguments: Any, cls: Any) -> None:
        name = getattr(cls, "kind", None)
        if name is None or arguments != () or ("." not in name and name not in _CLASSES):
            raise ValueError(f"refused a new object of {name}")
        self.make(Record(name))

    def build(self, state: Any) -> None:
        match self.top(), state:
            case Array(data=None) as array, {"handle": Bytes() as raw}:
                array.data, self.spare = read_array(raw, self.spare)
            case Array(data=None), {"handle": None}:
                pass  # refused as a state
            case Record(attributes=None) as record, dict():
                record.attributes = state
            case _Dtype() as dtype, (3, "<" | ">" | "|" as order, None, None, None, -1, -1, 0):
                dtype.form = order.replace("|", "<") + dtype.form[1:]
            case target, _:
                raise ValueError(f"refused to build a {kind(target)} from a {kind(state)}")


def _text(size: str) -> Callable[[Machine], None]:
    return lambda m: m.push(str(m.code.take(m.code.number(size)), "utf-8", "surrogatepass"))


def _bytes(size: str) -> Callable[[Machine], None]:
    return lambda m: m.make(Bytes(m.code.take(m.code.number(size))))


_OPCODES: dict[str, Callable[[Machine], None]] = {
    "\x95": Machine.frame,
    "(": Machine.mark,
    "N": lambda m: m.push(None),
    "\x88": lambda m: m.push(True),
    "\x89": lambda m: m.push(False),
    "K": lambda m: m.push(m.code.number("B")),
    "M": lambda m: m.push(m.code.number("<H")),
    "J": lambda m: m.push(m.code.number("<i")),
    "\x8a": Machine.integer,
    "G": lambda m: m.push(m.code.number(">d")),
    "\x8c": _text("B"),
    "X": _text("<I"),
    "\x8d": _text("<Q"),
    "C": _bytes("B"),
    "B": _bytes("<I"),
    "\x8e": _bytes("<Q"),
    "\x96": _bytes("<Q"),
    "}": lambda m: m.make({}),
    "]": lambda m: m.make([]),
    ")": lambda m: m.push(()),
    "\x85": lambda m: m.tuple_of(1),
    "\x86": lambda m: m.tuple_of(2),
    "\x87": lambda m: m.tuple_of(3),
    "t": lambda m: m.make(tuple(m.since_mark())),
    "a": lambda m: m.append([m.pop()]),
    "e": lambda m: m.append(m.since_mark()),
    "s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    "u": lambda m: m.set_items(m.since_mark()),
    "q": lambda m: m.put(m.code.number("B")),
    "r": lambda m: m.put(m.code.number("<I")),
    "\x94": lambda m: m.put(len(m.memo)),
    "h": lambda m: m.get(m.code.number("B")),
    "j": lambda m: m.get(m.code.number("<I")),
    "c": lambda m: m.find(*[m.line(), m.line()][::-1]),
    "\x93": lambda m: m.find(m.pop(), m.pop()),
    "R": lambda m: m.call(m.pop(), m.pop()),
    "\x81": lambda m: m.new(m.pop(), m.pop()),
    "b": lambda m: m.build(m.pop()),
}
