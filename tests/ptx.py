"""Compiled CUDA kernels, run on the CPU: their PTX, translated to C.

Triton's interpreter runs a kernel's Python code. What Triton compiles for a GPU may differ from that: constants are
folded, accesses are as wide as promises of alignment allow, values move between threads through shared memory. With
``ADAGRAD_TEST_PTX=90`` the tests of the CUDA kernels run what is compiled for compute capability 9.0, in the form in
which NVIDIA's assembler gets it. This needs gcc 12 or newer.

Each instruction is done for all 32 lanes of a warp before the next one. Programs run one by one in random order, and so
do the warps of a program from barrier to barrier: a barrier between warps that is missing changes results. A launch
fails where an address is not aligned to the size of the access, a branch divides a warp, or warps wait at different
barriers. Whether an address in global memory lies within an operand is not known here. An instruction that this
library's kernels had no use for yet is refused, as are those that do not round to nearest or flush subnormals to zero.
"""

from __future__ import annotations

import ctypes
import functools
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from adagrad.kernels.cuda.launch import Kernel

HEADER = Path(__file__).with_name("ptx.h")
REGISTER = re.compile(r"%(p|rs|r|rd)(\d+)")
SPECIAL = {"%tid.x": "32 * w->number + l", "%ctaid.x": "program", "%nctaid.x": "programs", "global_smem": "0"}
KINDS = {"pred", "f16", "f32", "f32x2", "f64", *(f"{letter}{bits}" for letter in "bus" for bits in (8, 16, 32, 64))}
SYMBOL = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "and": "&", "or": "|", "xor": "^", "min": "<", "max": ">",
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------- operands in C


def value(operand: str, kind: str) -> str:
    """An operand in one lane, read as ``kind``: a register, a special one, or bits."""
    if kind not in KINDS:
        raise ValueError(kind)
    if operand.startswith("!"):
        return "!" + value(operand[1:], kind)
    register = REGISTER.fullmatch(operand)
    if register:
        return f"w->{register[1]}[{register[2]}][l].{kind}"
    if operand in SPECIAL:
        bits = SPECIAL[operand]
    else:
        number = int(operand[2:], 16) if re.match("0[fd]", operand) else int(operand.rstrip("U"), 0)
        bits = f"{int(number != 0) if kind == 'pred' else number % 2**64}u"
    return f"((Lane){{.b64 = {bits}}}).{kind}"


def put(register: str, kind: str, result: str) -> str:
    """Put a result of ``kind`` into a register: integers with their sign, or zeros, up to its width."""
    if register == "_":  # nowhere
        return ""
    if kind not in KINDS:
        raise ValueError(kind)
    if kind == "pred":
        result = f"!!({result})"
    return f"{value(register, kind if kind[0] == 'f' else 's64')} = ({kind})({result});"


def width(kind: str) -> int:
    return int(re.sub(r"\D", "", kind)) // 8


def elements(operand: str) -> list[str]:
    """Those of a vector, or one."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


def address(operand: str, space: str, size: int, line: int) -> str:
    base, _, offset = operand.strip("[] ").partition("+")
    kind = "u32" if space == "shared" else "u64"
    return f"{space}_at({value(base.strip(), kind)} + ({kind}){int(offset or 0)}ll, {size}, {line})"


# ---------------------------------------------------------------------------------------------------- instructions in C


def compared(relation: str, kind: str, a: str, b: str) -> str:
    """A relation between integers, or one that holds only between numbers or, with a ``u``, also for a NaN."""
    match relation:
        case "num":
            return f"{a} == {a} && {b} == {b}"
        case "nan":
            return f"{a} != {a} || {b} != {b}"
        case "ltu" | "leu" | "gtu" | "geu" | "neu":
            opposite = {"ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<", "neu": "=="}[relation]
            return f"!({a} {opposite} {b})"
        case "ne" if kind[0] == "f":
            return f"{a} < {b} || {a} > {b}"
        case _:
            return f"{a} {SYMBOL[relation]} {b}"


def computed(parts: list[str], x: Callable[[int, str], str]) -> tuple[str, str] | None:
    """The kind and the expression of what an instruction computes of the operands ``x(1, kind)``, ``x(2, kind)``."""
    match parts:
        case ["sqrt", "rn", kind]:
            return kind, f"{'sqrtf' if kind == 'f32' else 'sqrt'}({x(1, kind)})"
        case [("add" | "sub" | "mul" | "div") as name, "rn", kind] | ["mul" as name, "lo", kind]:
            return kind, f"{x(1, kind)} {SYMBOL[name]} {x(2, kind)}"
        case [("add" | "sub") as name, "rn", "f32", "f16"]:
            return "f32", f"{x(1, 'f16')} {SYMBOL[name]} {x(2, 'f32')}"
        case [("add" | "sub" | "and" | "or" | "xor") as name, kind] if kind[0] != "f":
            return kind, f"{x(1, kind)} {SYMBOL[name]} {x(2, kind)}"
        case ["div", kind] if kind[0] != "f":  # in a lane without work perhaps by 0, whose result is not specified
            return kind, f"{x(2, kind)} ? {x(1, kind)} / {x(2, kind)} : 0"
        case ["mad", "lo", kind]:
            return kind, f"{x(1, kind)} * {x(2, kind)} + {x(3, kind)}"
        case ["mul" | "mad", "wide", kind]:
            wide = f"{kind[0]}{16 * width(kind)}"
            return wide, f"({wide}){x(1, kind)} * {x(2, kind)}" + (f" + {x(3, wide)}" if parts[0] == "mad" else "")
        case ["neg", kind]:
            return kind, f"-{x(1, kind)}"
        case ["not", kind]:
            return kind, f"{'!' if kind == 'pred' else '~'}{x(1, kind)}"
        case [("min" | "max") as name, kind] if kind[0] != "f":
            return kind, f"{x(1, kind)} {SYMBOL[name]} {x(2, kind)} ? {x(1, kind)} : {x(2, kind)}"
        case ["shl" | "shr", kind]:
            bits, by = 8 * width(kind), x(2, "u32")
            far = f"{x(1, kind)} < 0 ? -1 : 0" if kind[0] == "s" else "0"
            return kind, f"{by} < {bits} ? {x(1, kind)} {'<<' if parts[0] == 'shl' else '>>'} {by} : ({far})"
        case ["setp", relation, kind]:
            return "pred", compared(relation, kind, x(1, kind), x(2, kind))
        case ["selp", kind]:
            return kind, f"{x(3, 'pred')} ? {x(1, kind)} : {x(2, kind)}"
        case ["cvt", "rn", "f16x2", "f32"]:
            high, low = (f"((Lane){{.f16 = {x(i, 'f32')}}}).b16" for i in (1, 2))
            return "b32", f"(b32){high} << 16 | {low}"
        case ["cvt", "rn", to, kind]:
            return to, x(1, kind)
        case ["cvt", to, kind] if "f" not in to + kind or (to, kind) in (("f32", "f16"), ("f64", "f32")):
            return to, x(1, kind)
        case ["popc", "b32"]:
            return "u32", f"__builtin_popcount({x(1, 'b32')})"
        case ["bfe", "u32" | "s32" as kind]:
            return "u32", f"bits_of({x(1, 'u32')}, {x(2, 'u32')}, {x(3, 'u32')}, {int(kind == 's32')})"
        case ["prmt", "b32"]:
            return "b32", f"bytes_of({x(1, 'b32')}, {x(2, 'b32')}, {x(3, 'b32')})"
    return None


def moved(to: list[str], of: list[str], kind: str) -> str:
    """A register, parts of one put together, or one taken apart."""
    bits = 8 * width(kind) // max(len(to), len(of)) if kind != "pred" else 0
    if len(to) > 1:
        whole = value(of[0], kind)
        return "".join(put(part, f"b{bits}", f"{whole} >> {bits * i}") for i, part in enumerate(to))
    if len(of) > 1:
        return put(to[0], kind, " | ".join(f"(b64){value(x, f'b{bits}')} << {bits * i}" for i, x in enumerate(of)))
    return put(to[0], kind, value(of[0], kind))


def accessed(parts: list[str], operands: list[str], line: int) -> str | None:
    """A load, a store or an exchange of one or several elements."""
    kind = parts[-1]
    if parts[:2] == ["ld", "param"]:
        which = PARAMETER.fullmatch(operands[1])
        return put(operands[0], kind, f"parameters[{which[1]}]") if which and kind[0] != "f" else None
    space = next((name for name in ("global", "shared") for part in parts if part.split("::")[0] == name), None)
    if space is None:
        return None
    values, where = (operands[1], operands[0]) if parts[0] == "st" else (operands[0], operands[1])
    names = elements(values)
    start = f"{kind} *at = {address(where, space, width(kind) * len(names), line)};"
    match parts:
        case ["ld", *_]:
            return start + "".join(put(name, kind, f"at[{i}]") for i, name in enumerate(names))
        case ["st", *_]:
            return start + "".join(f"at[{i}] = {value(name, kind)};" for i, name in enumerate(names))
        case ["atom", "global", _, _, "exch", _]:
            return f"{start} {kind} old = *at; *at = {value(operands[2], kind)}; {put(names[0], kind, 'old')}"
    return None


def exchanged(parts: list[str], operands: list[str], line: int) -> str | None:
    """What the lanes of a warp do together."""
    x = [value(operand, "b32") for operand in operands if operand[0] not in "[{"]
    match parts:
        case ["shfl", "sync", "bfly" | "idx" as mode, "b32"] if operands[4] == "-1":
            other = f"from[source(l, {x[3]}, {int(mode == 'idx')}, {x[2]})]"
            return f"b32 from[32]; LANES from[l] = {x[1]}; LANES {{ {put(operands[0], 'b32', other)} }}"
        case ["redux", "sync", "add" | "min" | "max" as name, "s32" | "u32" as kind]:
            one = value(operands[1], kind)
            more = f"all + {one}" if name == "add" else f"{one} {SYMBOL[name]} all ? {one} : all"
            return (f'LANES if ({x[2]} != 0xffffffff) fail("lanes that are left out", {line});'
                    f" int l = 0; {kind} all = {one}; for (l = 1; l < 32; l++) all = {more};"
                    f" LANES {{ {put(operands[0], kind, 'all')} }}")  # fmt: skip
        case ["ldmatrix" | "stmatrix" as name, "sync", "aligned", "m8n8", "x1" | "x2" | "x4", "shared", "b16"]:
            # Eight lanes tell where the rows of 16 bytes of one matrix are; each lane has 4 bytes of one of them.
            values, where = operands if name == "ldmatrix" else reversed(operands)
            lines = [f"void *row[32]; LANES row[l] = l < {8 * len(elements(values))} ? "
                     f"{address(where, 'shared', 16, line)} : 0;"]  # fmt: skip
            for i, register in enumerate(elements(values)):
                at = f"*((b32 *)row[{8 * i} + l / 4] + l % 4)"
                lines.append(
                    f"LANES {{ {put(register, 'b32', at)} }}"
                    if name == "ldmatrix"
                    else f"LANES {at} = {value(register, 'b32')};"
                )
            return " ".join(lines)
    return None


PARAMETER = re.compile(r"\[\w+_param_(\d+)\]")
DECLARED = re.compile(r"\.reg \.\w+\s+%(\w+)<(\d+)>;")
LINE = re.compile(r"(?:@(!?%p\d+)\s+)?([\w.:]+)\s*(.*);")
APART = re.compile(r",\s*(?![^{[]*[}\]])")
"""The commas between operands, not those of vectors."""


def instruction(text: str, line: int) -> str:
    """One instruction of a warp. At a barrier, other warps take their turn."""
    try:
        found = LINE.fullmatch(text)
        done = found and carried_out(found[1], found[2].split("."), [o.strip() for o in APART.split(found[3])], line)
    except (KeyError, ValueError):
        done = None
    if not done:
        raise NotImplementedError(f"line {line} of the PTX: {text}")
    return f"{{ {done} }}"


def carried_out(guard: str | None, parts: list[str], operands: list[str], line: int) -> str | None:
    if parts[0] == "bra":
        jump = f"goto {operands[0].replace('$', '_')};"
        return f"int n = 0; LANES n += {value(guard, 'pred')}; if (uniform(n, {line})) {jump}" if guard else jump
    if parts[0] in ("ret", "bar", "shfl", "redux", "ldmatrix", "stmatrix"):
        if guard:
            return None
        match parts, operands:
            case ["ret"], [""]:
                return "w->at = -1; return;"
            case ["bar", "sync"], ["0"]:
                return f"w->at = {line}; return; case {line}:;"
            case ["bar", "warp", "sync"], ["-1"]:
                return ";"
        return exchanged(parts, operands, line)
    if parts[0] == "mov":
        done: str | None = moved(elements(operands[0]), elements(operands[1]), parts[-1])
    elif parts[0] in ("ld", "st", "atom"):
        done = accessed(parts, operands, line)
    else:
        result = computed(parts, lambda i, kind: value(operands[i], kind))
        done = result and put(operands[0], *result)
    condition = f"if ({value(guard, 'pred')}) " if guard else ""
    return done and f"LANES {condition}{{ {done} }}"


def translate(ptx: str, shared: int) -> str:
    """The C of a kernel that needs ``shared`` bytes of shared memory."""
    registers = " ".join(f"Lane {name}[{count}][32];" for name, count in DECLARED.findall(ptx))
    if re.search(r"\.func\b", ptx):
        raise NotImplementedError("PTX with functions")
    threads = int(re.findall(r"\.(?:req|max)ntid (\d+)", ptx)[0])
    body, begun = [], False
    for number, line in enumerate(ptx.splitlines(), 1):
        text = line.split("//")[0].strip()
        if not begun:
            begun = text == "{"
        elif text == "}":
            break
        elif text.endswith(":"):
            body.append(text.replace("$", "_") + ";")
        elif text and not text.startswith("."):
            body.append(f"{instruction(text, number)}  // {text}")
    return "\n".join([
        f"#define SHARED {shared}", f"#define WARPS {threads // 32}", f"#define REGISTERS {registers}",
        f'#include "{HEADER}"', "static void go_on(Warp *w, const u64 *parameters) { switch (w->at) { case 0:;",
        *body, f'fail("no return", {number});', "} }",
    ])  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- launches

_order = random.Random(0)


def is_available() -> bool:
    """Whether there is a compiler that knows numbers of 16 bits."""
    if shutil.which("gcc") is None:
        return False
    check = ["gcc", "-x", "c", "-fsyntax-only", "-"]
    return subprocess.run(check, input=b"_Float16 x;", capture_output=True, check=False).returncode == 0


@functools.cache
def library(ptx: str, shared: int) -> ctypes.CDLL:
    """A kernel as a library for this machine."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "kernel.c", Path(folder) / "kernel.so"
        source.write_text(translate(ptx, shared))
        language = "-w", "-Werror=implicit-function-declaration", "-fwrapv", "-fno-strict-aliasing", "-ffp-contract=off"
        subprocess.run(["gcc", *language, "-shared", "-fPIC", "-o", target, source, "-lm"], check=True)
        return ctypes.CDLL(str(target))


class Program:
    """A compiled kernel as :class:`adagrad.kernels.cuda.launch.Kernel` launches it."""

    def __init__(self, compiled: Any) -> None:
        self._ptx = compiled.asm["ptx"]
        self._library = library(self._ptx, compiled.metadata.shared)
        self._kinds = list(compiled.src.signature.values())

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return functools.partial(self._launch, grid[0])

    def _launch(self, programs: int, *words: Any) -> None:
        given = [word for word, kind in zip(words, self._kinds, strict=True) if kind != "constexpr"]
        scratch = 0, 0  # which Triton asks for without use
        parameters = (ctypes.c_uint64 * (len(given) + 2))(*[word % 2**64 for word in given], *scratch)
        line = self._library.launch(parameters, ctypes.c_uint32(programs), ctypes.c_uint64(_order.getrandbits(64)))
        if line:
            what = ctypes.c_char_p.in_dll(self._library, "failure").value
            raise RuntimeError(f"{what!r} in line {line} of the PTX: {self._ptx.splitlines()[line - 1].strip()}")


class Device:
    """What Triton asks of a driver when it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def install(capability: int) -> None:
    """Compile kernels for a GPU from now on, such as 90 for an H100, and launch them here."""
    triton.runtime.driver.set_active(Device(capability))
    compile_kernel = Kernel._compile
    Kernel._compile = lambda *arguments: Program(compile_kernel(*arguments))  # type: ignore[method-assign]
