"""Kernels as compiled for a GPU, run on the CPU: some of their tests; and whether that notices what it should."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import processes
import ptx
from adagrad.kernels.cuda.rule import TRITON

pytestmark = pytest.mark.skipif(not ptx.is_available(), reason="no gcc 12 or newer")

CHOSEN = {
    "test_cuda_dense.py": [
        "test_sizes_around_a_block[1025-float32]", "test_sizes_around_a_block[1025-bfloat16]",
        "test_special_values[float32]", "test_rounds_to_nearest_even[float16]", "test_row_wise[200-float32]",
        "test_tensors_without_alignment", "test_more_tensors_than_are_searched_at_once",
    ],
    "test_cuda_rows.py": [
        "test_frequent_and_rare_rows[False-float16]", "test_frequent_and_rare_rows[False-float64]",
        "test_frequent_and_rare_rows[True-float32]", "test_row_lengths[False-columns1]",
        "test_row_lengths[False-columns4]", "test_row_lengths[True-columns6]", "test_sums_begin_with_the_first_value",
        "test_one_row_longer_than_all_that_is_added_at_once", "test_runs_across_pieces[counts4-False]",
        "test_tables_of_one_form_share_their_launches[False-bfloat16]", "test_tables_that_begin_anywhere[3-values]",
        "test_tables_that_begin_anywhere[1-weight]", "test_few_keys_are_sorted_stably",
        "test_more_tables_than_are_looked_at_together[False-130]", "test_many_lookups[8192-False-float32]",
        "test_a_row_out_of_range_makes_the_call_a_no_op[int64-7-True]",
    ],
}  # fmt: skip


@pytest.mark.skipif(TRITON < (3, 5), reason="older versions compile to instructions that are not known here")
def test_compiled_kernels_give_the_bits_of_the_rule() -> None:
    """How to run all of these tests, which takes some minutes, is in CONTRIBUTING.md."""
    here = Path(__file__).parent
    tests = [f"{here / module}::{name}" for module, names in CHOSEN.items() for name in names]
    options = ["-q", "-p", "no:cacheprovider", *tests]
    unset = dict.fromkeys(["TRITON_INTERPRET", *(name for name in os.environ if name.startswith("PYTEST_"))])
    out = processes.run(
        f"import sys, pytest; sys.exit(pytest.main({options}))",
        options=(),
        ADAGRAD_TEST_PTX="90",
        CUDA_VISIBLE_DEVICES="",
        **unset,
    )
    assert "skipped" not in out


# -------------------------------------------------------------------------------------------------- what it computes


def launch(body: str, *, threads: int = 32, shared: int = 0) -> np.ndarray:
    """What one program leaves in %r9 of each thread; %r1 is the thread's number, %rd1 the address of 0, 1, ... 127."""
    body = body.replace("; ", ";\n").replace(": ", ":\n")
    text = f"""
        .visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1)
        .reqntid {threads}
        {{
            .reg .pred %p<5>;
            .reg .b16 %rs<5>;
            .reg .b32 %r<10>;
            .reg .b64 %rd<5>;
            mov.u32 %r1, %tid.x;
            ld.param.b64 %rd1, [kernel_param_0];
            {body}
            ld.param.b64 %rd1, [kernel_param_1];
            mad.wide.u32 %rd2, %r1, 4, %rd1;
            st.global.b32 [%rd2], %r9;
            ret;
        }}
    """
    memory, result = np.arange(128, dtype=np.int32), np.zeros(threads, np.int32)
    kernel = SimpleNamespace(
        asm={"ptx": "\n".join(line.strip() for line in text.splitlines())},
        metadata=SimpleNamespace(shared=shared),
        src=SimpleNamespace(signature={"memory": "*i32", "result": "*i32"}),
    )
    ptx.Program(kernel)[(1, 1, 1)](memory.ctypes.data, result.ctypes.data)
    return result


LANE = np.arange(32)
NAN = "mov.b32 %r2, 0f7FC00000;"
SCALE = "cvt.rn.f32.s32 %r3, %r1; mul.rn.f32 %r3, %r3, 0f3DCCCCCD;"  # 0.1


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("bfe.u32 %r9, %r1, 1, 3;", LANE >> 1 & 7),
        ("bfe.s32 %r9, %r1, 1, 3;", (LANE >> 1 & 7) - 8 * (LANE >> 3 & 1)),
        ("bfe.s32 %r9, -1, 3, 0;", 0 * LANE),
        ("bfe.u32 %r9, -1, 40, 3;", 0 * LANE),
        ("bfe.s32 %r9, 0x80000000, 40, 3;", 0 * LANE - 1),
        ("bfe.s32 %r9, 0x80000000, 28, 16;", 0 * LANE - 8),
        ("prmt.b32 %r9, %r1, 258, 0x1054U;", 258 | LANE << 16),
        ("sub.s32 %r2, %r1, 16; prmt.b32 %r9, %r2, 0, 0x8880;", LANE - 16),
        ("shfl.sync.bfly.b32 %r9, %r1, 5, 31, -1;", LANE ^ 5),
        ("shfl.sync.bfly.b32 %r9, %r1, 37, 31, -1;", LANE ^ 5),
        ("shfl.sync.idx.b32 %r9, %r1, 5, 31, -1;", 0 * LANE + 5),
        ("shfl.sync.idx.b32 %r9, %r1, 1, 7199, -1;", LANE // 4 * 4 + 1),  # segments of four lanes
        ("mov.b32 %r2, -1; redux.sync.add.s32 %r9, %r1, %r2;", 0 * LANE + 496),
        ("mov.b32 %r2, -1; redux.sync.max.s32 %r9, %r1, %r2;", 0 * LANE + 31),
        ("shl.b32 %r9, %r1, 32;", 0 * LANE),
        ("neg.s32 %r2, %r1; shr.s32 %r9, %r2, 40;", np.where(LANE > 0, -1, 0)),
        ("neg.s32 %r2, %r1; shr.u32 %r9, %r2, 31;", LANE > 0),
        ("neg.s32 %r2, %r1; setp.lt.u32 %p1, %r2, 5; selp.b32 %r9, 1, 2, %p1;", np.where(LANE == 0, 1, 2)),
        ("neg.s32 %r2, %r1; cvt.s64.s32 %rd2, %r2; shr.u64 %rd2, %rd2, 63; cvt.u32.u64 %r9, %rd2;", LANE > 0),
        ("neg.s32 %r2, %r1; mul.wide.u32 %rd2, %r2, 2; mov.b64 {_, %r9}, %rd2;", LANE > 0),
        ("cvt.u16.u32 %rs1, %r1; mov.b32 %r9, {%rs1, %rs1};", LANE * 65537),
        (f"{SCALE} mov.b32 %r9, %r3;", (np.float32(0.1) * LANE.astype(np.float32)).view(np.int32)),
        (f"{SCALE} div.rn.f32 %r9, %r3, 0f40400000;",
         (np.float32(0.1) * LANE.astype(np.float32) / np.float32(3)).view(np.int32)),
        (f"{SCALE} sqrt.rn.f32 %r9, %r3;", np.sqrt(np.float32(0.1) * LANE.astype(np.float32)).view(np.int32)),
        (f"{SCALE} cvt.rn.f16x2.f32 %r9, %r3, 0f3F800000;",
         (np.float32(0.1) * LANE.astype(np.float32)).astype(np.float16).view(np.int16).astype(int) << 16 | 0x3C00),
        (f"{NAN} setp.neu.f32 %p1, %r2, %r2; selp.b32 %r9, 1, 2, %p1;", 0 * LANE + 1),
        (f"{NAN} setp.num.f32 %p1, %r2, %r2; selp.b32 %r9, 1, 2, %p1;", 0 * LANE + 2),
        (f"{NAN} setp.ne.f32 %p1, %r2, %r2; selp.b32 %r9, 1, 2, %p1;", 0 * LANE + 2),
        (f"{NAN} setp.gt.f32 %p1, %r2, %r2; selp.b32 %r9, 1, 2, %p1;", 0 * LANE + 2),
        ("setp.lt.s32 %p1, %r1, 9; xor.pred %p2, %p1, -1; selp.b32 %r9, 1, 2, %p2;", np.where(LANE < 9, 2, 1)),
        ("div.s32 %r9, %r1, 3;", LANE // 3),
        ("mov.b32 %r9, 7; setp.lt.s32 %p1, %r1, 9; @!%p1 mov.b32 %r9, %r1;", np.where(LANE < 9, 7, LANE)),
        ("mad.wide.u32 %rd2, %r1, 8, %rd1; ld.global.v2.b32 {%r8, %r9}, [%rd2+8];", 2 * LANE + 3),
    ],
)  # fmt: skip
def test_instructions(body: str, expected: Any) -> None:
    """Against what NVIDIA's description of PTX says of them."""
    np.testing.assert_array_equal(launch(body), expected)


TO_SHARED = "mov.b32 %r2, global_smem; mad.lo.s32 %r3, %r1, 4, %r2; st.shared.b32 [%r3], %r1;"


def test_matrices_in_shared_memory() -> None:
    """Each lane has two neighbours of the row of eight 16-bit numbers that is a quarter of its own number."""
    lanes = "and.b32 %r4, %r1, 7; mad.lo.s32 %r5, %r4, 16, %r2;"
    load = f"{TO_SHARED} {lanes} ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r9}}, [%r5];"
    np.testing.assert_array_equal(launch(load, shared=128), LANE)
    backwards = "sub.s32 %r4, 7, %r4; mad.lo.s32 %r6, %r4, 16, %r2;"  # row 7 of shared memory is row 0 of the matrix
    store = f"{lanes} {backwards} stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r6], {{%r1}}; ld.shared.b32 %r9, [%r3];"
    np.testing.assert_array_equal(launch(f"{TO_SHARED} {store}", shared=128), (7 - LANE // 4) * 4 + LANE % 4)


def test_a_barrier_that_is_missing_is_noticed() -> None:
    """Each thread reads what the one opposite in the other warp wrote."""
    across = "xor.b32 %r4, %r1, 32; mad.lo.s32 %r5, %r4, 4, %r2; ld.shared.b32 %r9, [%r5];"
    thread = np.arange(64)
    for _ in range(8):
        np.testing.assert_array_equal(launch(f"{TO_SHARED} bar.sync 0; {across}", threads=64, shared=256), thread ^ 32)
        assert (launch(f"{TO_SHARED} {across}", threads=64, shared=256) != thread ^ 32).any()


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("add.s64 %rd2, %rd1, 4; ld.global.v2.b32 {%r8, %r9}, [%rd2];", "global memory that is not aligned"),
        ("mov.b32 %r2, 2; st.shared.b32 [%r2], %r1;", "shared memory that is not aligned"),
        ("mov.b32 %r2, 64; st.shared.b32 [%r2], %r1;", "outside of shared memory"),
        ("setp.eq.s32 %p1, %r1, 3; @%p1 bra $L__BB0_1; mov.b32 %r9, 1; $L__BB0_1: mov.b32 %r9, 2;", "a branch that"),
        ("setp.lt.s32 %p1, %r1, 32; @%p1 bra $L__BB0_1; bar.sync 0; $L__BB0_1: bar.sync 0;", "different barriers"),
    ],
)
def test_what_a_device_would_not_forgive(body: str, what: str) -> None:
    with pytest.raises(RuntimeError, match=what):
        launch(body, threads=64, shared=64)


@pytest.mark.parametrize(
    "instruction",
    [
        "fma.rn.f32 %r9, %r1, %r1, %r1;", "add.f32 %r9, %r1, %r1;", "add.rn.ftz.f32 %r9, %r1, %r1;",
        "div.full.f32 %r9, %r1, %r1;", "div.approx.f32 %r9, %r1, %r1;", "sqrt.approx.f32 %r9, %r1;",
        "rsqrt.approx.f32 %r9, %r1;", "cvt.rz.f32.f64 %r9, %rd1;", "min.f32 %r9, %r1, %r1;",
        "vote.sync.any.pred %p1, %p2, -1;", "bfe.u64 %rd1, %rd2, 1, 2;", "setp.equ.f32 %p1, %r1, %r2;",
        "mov.u32 %r9, %laneid;", "cvt.rn.bf16.f32 %rs1, %r1;", "ld.local.b32 %r9, [%rd1];",
        "redux.sync.min.f32 %r9, %r1, -1;",
        "ld.param.f32 %r9, [kernel_param_0];", "ld.param.b32 %r9, [kernel_param_0+4];", "bar.sync 1, 32;",
        "@%p1 bar.warp.sync -1;", "@%p1 ret;", "{",
    ],
)  # fmt: skip
def test_what_is_not_rounded_to_nearest_or_not_known_is_refused(instruction: str) -> None:
    with pytest.raises(NotImplementedError, match=re.escape(instruction)):
        launch(instruction)
