"""Groups of rows: every occurrence in that of its row, shared by workers; and their ids, checked."""

from __future__ import annotations

import re
from typing import Any

import numba
import numpy as np
import pytest

from adagrad.kernels import records
from adagrad.kernels.cpu import row_groups
from adagrad.kernels.names import in_lists
from row_operands import FLOAT32, rows
from support import HYPERS, update_plain


@numba.njit
def grouped_by(ids: np.ndarray, k: int, count: int) -> Any:
    return row_groups.group(ids, k, count)


def grouped(ids: np.ndarray, count: int) -> dict[int, list[int]]:
    """The positions of each row, as ``count`` workers have them."""
    found: dict[int, list[int]] = {}
    for k in range(count):
        single, positions, added, to, summed, counts = (part.tolist() for part in grouped_by(ids, k, count))
        assert positions == sorted(positions)
        assert added == sorted(added)
        several: list[list[int]] = [[] for _ in summed]
        for position, number in zip(added, to, strict=True):
            several[number].append(position)
        for row, where in [*zip(single, ([i] for i in positions), strict=True), *zip(summed, several, strict=True)]:
            assert row not in found, "two workers, or two numbers, for one row"
            found[row] = where
        assert list(map(len, several)) == counts
        assert min(counts, default=2) > 1
    return found


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("number", [1, 2, 3, 255, 256, 257, 2048, 70_000, 2**22 + 1, 2**31 - 1, 2**40, 2**62])
def test_groups_are_the_rows(number: int, threads: int) -> None:
    """Every occurrence in the group of its row, in order, for tables of any height."""
    rng = np.random.default_rng(15)
    for count in (0, 1, 40, 3000):
        ids = rng.integers(0, number, count)
        ids = np.concatenate([ids, [0, number - 1, 0, number - 1], rng.choice(ids, count // 2)]) if count else ids
        want: dict[int, list[int]] = {}
        for i, row in enumerate(ids.tolist()):
            want.setdefault(row, []).append(i)
        assert grouped(ids, threads) == want


@pytest.mark.parametrize("step", [1, 2, 3, 64, 1024, 2**20, 2**32 + 1, 0x9E3779B9])
def test_rows_at_a_regular_distance(step: int) -> None:
    ids = np.tile(np.arange(5000) * step, 2)
    found = grouped(ids, 2)
    assert found == {i * step: [i, i + 5000] for i in range(5000)}


@numba.njit
def probes(ids: np.ndarray, bits: int, seed: int) -> float:
    """Places of a hash table of ``2**bits`` that are looked at for an id, on average, to enter distinct ids."""
    table, looked_at = np.zeros(1 << bits, np.bool_), 0
    for row in ids:
        at = np.int64(row_groups._hash(row, np.uint64(seed)) >> np.uint64(64 - bits))
        looked_at += 1
        while table[at]:
            at = (at + 1) % len(table)
            looked_at += 1
        table[at] = True
    return looked_at / len(ids)


@pytest.mark.parametrize("seed", [0, 0x7F3A_5C40_2010, 0x55D1_9E8B_37C0])
def test_no_step_of_the_ids_makes_them_collide(seed: int) -> None:
    """At half load random places take 1.5 looks; ids at a regular distance, as products of features have, no more."""
    steps = [*range(1, 600, 1 if seed == 0 else 7), 1024, 3632, 14_528, 2**20, 2**32]
    worst = {step: probes(np.arange(100_000) * step, 18, seed) for step in steps}
    assert max(worst.values()) < 1.8, max(worst, key=worst.__getitem__)


def test_ids_that_were_chosen_to_collide_do_so_for_one_seed_alone() -> None:
    hashes = numba.njit(lambda rows, seed: np.array([row_groups._hash(row, np.uint64(seed)) for row in rows]))
    rows = np.arange(2**22)
    chosen = rows[np.argsort(hashes(rows, 0) >> np.uint64(46), kind="stable")[:4096]]
    assert probes(chosen, 13, 0) > 100
    assert probes(chosen, 13, 0x7F3A_5C40_2010) < 1.8


def test_who_knows_the_hash_cannot_choose_ids_that_collide() -> None:
    """Where a row is in the table depends on where the table is."""
    table_of = numba.njit(lambda ids: row_groups._number(ids, len(ids) - row_groups._AHEAD)[4])
    ids = np.arange(4096 + row_groups._AHEAD)
    first, second = table_of(ids), table_of(ids)
    assert np.unique(first).tolist() == np.unique(second).tolist()
    assert (first != second).mean() > 0.5


@pytest.mark.parametrize("count", [2, 4, 8])
def test_workers_share_rows_of_a_table_of_features_evenly(count: int) -> None:
    """Ids come feature by feature, as embedding bags do: what stands at a regular distance is not like the others."""
    rng = np.random.default_rng(25)
    ids = np.arange(16) * 50_000 + rng.integers(0, 50_000, (65_536, 16))
    ids[:, 0] = rng.integers(0, 50_000, 65_536) % 2
    of_worker = numba.njit(lambda ids, k, count: len(row_groups.own_rows(ids, k, count)[0]))
    shares = [of_worker(ids.reshape(-1), k, count) / ids.size for k in range(count)]
    assert sum(shares) == 1
    assert max(shares) < 1.3 / count


def test_workers_share_frequent_rows() -> None:
    of_worker = numba.njit(lambda ids, k, count: len(row_groups.own_rows(ids, k, count)[0]))
    assert [of_worker(np.tile([0, 1], 2000), k, 2) for k in range(2)] == [2000, 2000]
    at_first = np.concatenate([np.full(1024, 5), np.random.default_rng(34).integers(100, 50_000, 60_000)])
    assert max(of_worker(at_first, k, 2) for k in range(2)) < 0.6 * len(at_first)


@pytest.mark.usefixtures("always_parallel")
@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_grouped_is_released(threads: int) -> None:
    """What Numba allocates for each worker and each weight: for sums of many and of few, or for none."""
    from numba.core.runtime import _nrt_python, rtsys

    rng, were_counted = np.random.default_rng(33), _nrt_python.memsys_stats_enabled()
    lists = (rng.integers(0, 9, 3000), np.arange(10), np.full(300, 4), rng.permutation(10))
    given = [rows(rng, FLOAT32, (10, 3), ids) for ids in lists]
    update_plain(given, [HYPERS["plain"]], threads)  # compiles
    _nrt_python.memsys_enable_stats()
    try:
        before = rtsys.get_allocation_stats()
        assert update_plain(given, [HYPERS["plain"]], threads)
        after = rtsys.get_allocation_stats()
    finally:
        if not were_counted:
            _nrt_python.memsys_disable_stats()
    assert after.alloc > before.alloc
    assert after.alloc - before.alloc == after.free - before.free


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_row_ids_are_copied_and_checked(dtype: Any) -> None:
    def check_ids(ids: list[int], height: int = 5) -> bool:
        given, facts = np.array(ids, dtype), np.zeros(records.FACTS, np.int64)
        facts[records.ENTRIES], facts[records.HEIGHT] = len(ids), height
        facts[records.ARE_LONG] = dtype == np.int64
        facts[records.BASE + records.IDS] = given.ctypes.data
        rows = row_groups.checked_rows(in_lists(3), facts)
        assert rows.dtype == (np.int32 if height <= 2**31 else np.int64)
        assert rows.tolist() == ids
        assert not np.shares_memory(rows, given)
        assert facts[records.CHECKED_IDS] == rows.ctypes.data
        return bool(facts[records.ARE_INCREASING])

    assert check_ids([0, 1, 2, 4])
    assert check_ids([])
    assert check_ids([3])
    assert not check_ids([0, 1, 1, 4])
    assert not check_ids([1, 0])
    assert not check_ids([0, 1, 2, 3, 4, 0])
    assert check_ids([0, 2**31 - 1], 2**31)
    assert not check_ids([2**31 - 1, 0], 2**31 + 1)
    for ids, at in ([0, 5, 5], 1), ([-1], 0), ([4, 3, 2, 1, 0, -7], 5), ([2**31 - 1], 0), ([0, 1, 2, 3, 4, 5], 5):
        message = f"indices of grads[3]: indices[{at}]={ids[at]}: must be in [0, 5), the weight's rows"
        with pytest.raises(IndexError, match=re.escape(message)):
            check_ids(ids)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("height", [9, 2**31 + 1])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_workers_check_the_row_ids_together(dtype: Any, height: int, count: int) -> None:
    """What is found does not depend on who looks at which part, an empty one included."""
    check = row_groups.checking(height > 2**31)

    def found(ids: list[int]) -> tuple[int, int, bool]:
        given, facts = np.array(ids, dtype), np.zeros(records.FACTS, np.int64)
        rows = np.empty(len(ids), np.int64 if height > 2**31 else np.int32)
        facts[records.ENTRIES], facts[records.HEIGHT] = len(ids), height
        facts[records.ARE_LONG] = dtype == np.int64
        facts[records.BASE + records.IDS] = given.ctypes.data
        room = np.full((count, row_groups.FINDINGS), 77)
        bad, row = row_groups._check_ids(facts, rows.ctypes.data, room, check, count)
        if bad < 0:
            assert rows.tolist() == ids
        return bad, row, bool(facts[records.ARE_INCREASING])

    for ids in ([], [0], [8, 8], list(range(9)), [0, 1, 2, 3, 4, 5, 6, 7, 7], [*range(9), *range(9)], [8, 7, 6, 5]):
        assert found(ids) == (-1, 0, ids == sorted(set(ids)))
    for at in range(9):
        ids = list(range(9))
        ids[at] = max(ids[at] - 2, 0)
        assert found(ids)[2] == (at == 0), "a step down at any place, a border between workers included"
        for outside in {-1, height, int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)}:
            if not 0 <= outside < height and outside <= np.iinfo(dtype).max:
                assert found([*ids[:at], outside, *ids[at:]])[:2] == (at, outside)
