"""The rule as every Triton kernel computes it, one tile at a time; :mod:`adagrad.rule` states it.

Each operation is rounded on its own: division and root are the correctly rounded ones, and the kernels are compiled
without fused multiply-add (:mod:`adagrad.kernels.cuda.launch`). Clipping uses comparisons, which let a NaN through, not
``minimum`` and ``maximum``.

``table`` holds what changes from weight to weight and from step to step, as 64-bit words in device memory, because a
kernel's own float arguments arrive as float32 and because a launch must not depend on the number of weights::

    word 0..4          rescale_grad, clip_gradient (infinity for none), epsilon under the root, epsilon outside it (one
                       of the two is 0, and adding 0 to a number >= 0 changes no bit), 1 where the decay is decoupled
    word HEADER + 4 i  of weight i: lr; wd; the address of an lr on the device, or 0; the bits of that lr, 32 or 64
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from adagrad import rule

HEADER = tl.constexpr(8)
SETTINGS = tl.constexpr(4)
LANES = tl.constexpr(rule.LANES)

TRITON = tuple(int(n) for n in triton.__version__.split(".")[:2])
if TRITON < (3, 2):
    raise ImportError(f"triton {triton.__version__}: must be 3.2 (which comes with PyTorch 2.6) or later")

FLUSHES = tl.constexpr(
    TRITON < (3, 6) and os.environ.get("TRITON_INTERPRET") != "1" and torch.version.hip is None
)  # fmt: skip
"""Whether ``div_rn`` and ``sqrt_rn`` flush subnormals to zero, as they do for NVIDIA with Triton before 3.6."""

TRITON_DTYPE = {"float16": tl.float16, "bfloat16": tl.bfloat16, "float32": tl.float32, "float64": tl.float64}


@triton.jit
def widen(x: tl.tensor, COMPUTE: tl.constexpr) -> tl.tensor:
    """``x`` in the computing dtype. For bfloat16 by its bits: exact everywhere, subnormals included."""
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(COMPUTE)
    return wide


@triton.jit
def narrow(x: tl.tensor, WEIGHT: tl.constexpr) -> tl.tensor:
    """``x`` rounded to nearest-even. To bfloat16 by its bits: Triton's interpreter rounds differently."""
    if tl.bfloat16 == WEIGHT:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet_nan = (bits >> 16) | 0x40
        result = tl.where(x == x, rounded, quiet_nan).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(WEIGHT)
    return result


@triton.jit
def read_weight(weight: tl.tensor, master: tl.tensor, offsets: tl.tensor, mask: tl.tensor, COMPUTE: tl.constexpr,
                HAS_MASTER: tl.constexpr) -> tl.tensor:  # fmt: skip
    """What the rule acts on: the master copy where there is one."""
    if HAS_MASTER:
        current = tl.load(master + offsets, mask=mask)
    else:
        current = widen(tl.load(weight + offsets, mask=mask), COMPUTE)
    return current


@triton.jit
def write_weight(weight: tl.tensor, master: tl.tensor, offsets: tl.tensor, new: tl.tensor, mask: tl.tensor,
                 WEIGHT: tl.constexpr, HAS_MASTER: tl.constexpr) -> None:  # fmt: skip
    if HAS_MASTER:
        tl.store(master + offsets, new, mask=mask)
    tl.store(weight + offsets, narrow(new, WEIGHT), mask=mask)


@triton.jit
def divide(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """``x / y``, correctly rounded."""
    if x.dtype == tl.float64:
        quotient = x / y
    elif FLUSHES:
        quotient = tl.inline_asm_elementwise("div.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, True, 1)
    else:
        quotient = tl.div_rn(x, y)
    return quotient


@triton.jit
def sqrt(x: tl.tensor) -> tl.tensor:
    """The square root, correctly rounded."""
    if x.dtype == tl.float64:
        result = tl.sqrt(x)
    elif FLUSHES:
        result = tl.inline_asm_elementwise("sqrt.rn.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        result = tl.sqrt_rn(x)
    return result


@triton.jit
def as_number(word: tl.tensor, COMPUTE: tl.constexpr) -> tl.tensor:
    """The float64 at ``word``, rounded once to the computing dtype."""
    return tl.load(word).to(tl.float64, bitcast=True).to(COMPUTE)


@triton.jit
def gradient_scalars(table: tl.tensor, index: tl.tensor, COMPUTE: tl.constexpr) -> tuple[tl.tensor, ...]:
    """rescale_grad, clip_gradient and the coupled wd of weight ``index``."""
    wd = as_number(table + HEADER + SETTINGS * index + 1, COMPUTE)
    decoupled = as_number(table + 4, COMPUTE)
    return as_number(table, COMPUTE), as_number(table + 1, COMPUTE), tl.where(decoupled == 0, wd, 0.0)


@triton.jit
def step_scalars(table: tl.tensor, index: tl.tensor, COMPUTE: tl.constexpr) -> tuple[tl.tensor, ...]:
    """lr, the decoupled wd and the two epsilons of weight ``index``."""
    settings = table + HEADER + SETTINGS * index
    wd = as_number(settings + 1, COMPUTE)
    decoupled = as_number(table + 4, COMPUTE)
    address, bits = tl.load(settings + 2), tl.load(settings + 3)
    single = tl.load(address.to(tl.pointer_type(tl.float32)), mask=bits == 32, other=0.0)
    double = tl.load(address.to(tl.pointer_type(tl.float64)), mask=bits == 64, other=0.0)
    lr = tl.where(bits == 32, single.to(COMPUTE), double.to(COMPUTE))
    lr = tl.where(bits == 0, as_number(settings, COMPUTE), lr)
    return lr, tl.where(decoupled == 0, 0.0, wd), as_number(table + 2, COMPUTE), as_number(table + 3, COMPUTE)


@triton.jit
def effective_gradient(grad: tl.tensor, weight: tl.tensor, grad_scale: tl.tensor, rescale: tl.tensor, clip: tl.tensor,
                       wd: tl.tensor) -> tl.tensor:  # fmt: skip
    """The gradient that enters the history. ``grad_scale`` is None or points to what GradScaler multiplied by."""
    if grad_scale is not None:
        grad = divide(grad, tl.load(grad_scale).to(grad.dtype))
    grad = grad * rescale
    grad = tl.where(grad > clip, clip, grad)
    grad = tl.where(grad < -clip, -clip, grad)
    return tl.where(wd != 0, grad + wd * weight, grad)


@triton.jit
def new_weight(weight: tl.tensor, grad: tl.tensor, history: tl.tensor, lr: tl.tensor, decoupled_wd: tl.tensor,
               eps_inside: tl.tensor, eps_outside: tl.tensor) -> tl.tensor:  # fmt: skip
    """The new weight, from the new history."""
    step = divide(grad, sqrt(history + eps_inside) + eps_outside)
    step = tl.where(decoupled_wd != 0, step + decoupled_wd * weight, step)
    return weight - lr * step


@triton.jit
def halves(x: tl.tensor, ROWS: tl.constexpr, HALF: tl.constexpr) -> tuple[tl.tensor, ...]:
    """The left and the right half of the columns of ``x`` (ROWS, 2 HALF)."""
    left, right = tl.split(tl.permute(tl.reshape(x, [ROWS, 2, HALF]), [0, 2, 1]))
    return left, right


@triton.jit
def add_2_groups(lanes: tl.tensor, square: tl.tensor, ROWS: tl.constexpr) -> tl.tensor:
    left, right = halves(square, ROWS, LANES)
    return lanes + left + right


@triton.jit
def add_4_groups(lanes: tl.tensor, square: tl.tensor, ROWS: tl.constexpr) -> tl.tensor:
    left, right = halves(square, ROWS, 2 * LANES)
    return add_2_groups(add_2_groups(lanes, left, ROWS), right, ROWS)


@triton.jit
def add_to_lanes(lanes: tl.tensor, square: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> tl.tensor:
    """``lanes`` (ROWS, 16) plus the columns of ``square`` (ROWS, COLUMNS), left to right, column j to lane j mod 16.

    COLUMNS is 16, 32, 64 or 128. Not recursive, because Triton before 3.5 cannot compile that.
    """
    if COLUMNS == LANES:
        lanes = lanes + square
    elif COLUMNS == 2 * LANES:
        lanes = add_2_groups(lanes, square, ROWS)
    elif COLUMNS == 4 * LANES:
        lanes = add_4_groups(lanes, square, ROWS)
    else:
        left, right = halves(square, ROWS, 4 * LANES)
        lanes = add_4_groups(add_4_groups(lanes, left, ROWS), right, ROWS)
    return lanes


@triton.jit
def add_halves(lanes: tl.tensor, ROWS: tl.constexpr, HALF: tl.constexpr) -> tl.tensor:
    """The left half of the lanes plus the right half.

    Not by :func:`halves`, through which Triton would carry the layouts of all that follows back to the lanes: each
    thread would then add up the lanes of all.
    """
    return tl.sum(tl.reshape(lanes, [ROWS, 2, HALF]), axis=1)


@triton.jit
def add_mean(history: tl.tensor, rows: tl.tensor, old: tl.tensor, lanes: tl.tensor, length: tl.tensor, mask: tl.tensor,
             ROWS: tl.constexpr) -> tl.tensor:  # fmt: skip
    """The new history values (ROWS, 1): ``old`` plus the mean of squares, the ``lanes`` of each row combined by halves
    and divided by the row's length. They are stored at the offsets ``rows`` of ``history``."""
    lanes = add_halves(add_halves(add_halves(add_halves(lanes, ROWS, 8), ROWS, 4), ROWS, 2), ROWS, 1)
    new = old + divide(lanes, length.to(lanes.dtype))
    tl.debug_barrier()  # no warp may read what another has already written
    tl.store(history + rows, new, mask=mask)
    return new


@triton.jit
def halted(skip: tl.tensor, found_inf: tl.tensor) -> tl.tensor:
    """Whether this call must change nothing: a row id out of range, or a gradient that is not finite.

    Either pointer may be None.
    """
    halt = 0
    if skip is not None:
        halt = halt | (tl.load(skip) != 0).to(tl.int32)
    if found_inf is not None:
        halt = halt | (tl.load(found_inf) != 0).to(tl.int32)
    return halt != 0
