"""Tables in device memory that CUDA kernels read their parameters from.

They hold the addresses of the dense tensors, those of several row-sparse updates, and the settings (the rule's scalars,
lr and wd). A table is uploaded, from pinned memory and without waiting, only if no recent call used the same one; dense
launches are kept with their tables. While a CUDA graph is captured, the tables are the graph's own: it copies them from
pinned memory at each replay, so that later calls cannot change them. Hyper-parameters that are Python numbers are then
frozen into the graph; an lr that is a tensor is read by each replay.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from adagrad.kernels.cuda import dense
from adagrad.kernels.cuda.rule import HEADER, SETTINGS

if TYPE_CHECKING:
    from adagrad.kernels.cuda.dense import DenseUpdates
    from adagrad.kernels.cuda.row_launches import Plan
    from adagrad.rule import Rule

T = TypeVar("T")

KEPT = 16
"""Tables of one kind that are kept for later calls on the same stream."""

FLAGS = 64
"""Numbers that are set to 0 at once, one for each call with row ids."""


SLAB = 2**17
"""Words of pinned memory reserved for captures, which may be unable to allocate any; more if tables are large."""

_slab: list[Tensor] = []
"""The unused rest of it, in one tensor; empty before the first reservation."""

_slab_lock = threading.Lock()

_captured: list[Tensor] = []
"""Pinned memory that captured graphs read at each replay; nothing tells when a graph is gone, so it is never freed."""


class _Local(threading.local):
    def __init__(self) -> None:
        self.tables: dict[tuple[torch.device, int], Tables] = {}


_local = _Local()


def tables_of(device: torch.device) -> Tables:
    """The tables of this thread and the current stream of ``device``, the current one: work on them is in its order."""
    is_cuda = device.type == "cuda"
    key = device, _stream_of(device.index) if is_cuda else 0
    tables = _local.tables.get(key)
    if tables is None:
        tables = _local.tables[key] = Tables(device)
    tables.is_capturing = is_cuda and torch.cuda.is_current_stream_capturing()
    return tables


def _current_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


_stream_of: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream)
"""The address of a device's current stream. PyTorch's compiler and Triton ask in this way, which makes no object."""


class Tables:
    """The last tables that a thread uploaded for one stream."""

    is_capturing = False
    """Whether the call is captured into a graph, which gets tables of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._addresses: list[tuple[Any, tuple[Tensor, list[dense.Launch]]]] = []
        self._rows: list[tuple[Any, tuple[Tensor, Plan]]] = []
        self._settings: list[tuple[Any, Tensor]] = []
        self._bound: list[tuple[Any, tuple[list[Callable[[], object]], Tensor, Tensor]]] = []
        self._flags: list[Tensor] = []

    def flag(self) -> Tensor:
        """One int32 number on the device, 0 before a call's kernels run."""
        if self.is_capturing:  # each replay must begin with 0
            return torch.zeros(1, dtype=torch.int32, device=self._device)
        if not self._flags:
            # Many at once, because filling takes a launch. Each is at a multiple of 16 bytes, as if it were alone.
            self._flags = list(torch.zeros((FLAGS, 4), dtype=torch.int32, device=self._device)[:, :1].unbind())
        return self._flags.pop()

    def addresses(self, updates: DenseUpdates) -> tuple[Tensor, list[dense.Launch]]:
        """The table of addresses and the launches that use it."""

        def make() -> tuple[Tensor, list[dense.Launch]]:
            words, launches = dense.plan(updates)
            return self._upload(words), launches

        key = updates.rows.tobytes(), updates.codes.tobytes(), updates.share_rates
        return self._recent(self._addresses, key, make)

    def dense_launches(self, addresses: Tensor, launches: list[dense.Launch], settings: Tensor,
                       *numbers: Tensor | None) -> list[Callable[[], object]]:  # fmt: skip
        """What carries out the launches, with two tables that are known here; ``numbers`` as in the kernels."""

        def make() -> tuple[list[Callable[[], object]], Tensor, Tensor]:
            bound = [dense.bind(launch, addresses, settings, *numbers) for launch in launches]
            return bound, addresses, settings  # held, so that no others can have their ids

        if any(number is not None for number in numbers):
            return make()[0]
        return self._recent(self._bound, (id(addresses), id(settings)), make)[0]

    def rows(self, key: Any, plan: Callable[[], Plan]) -> tuple[Tensor, Plan]:
        """The table of several row-sparse updates and the plan for them, which ``key`` determines."""

        def make() -> tuple[Tensor, Plan]:
            found = plan()
            return self._upload(found.words), found

        return self._recent(self._rows, key, make)

    def settings(self, lrs: Sequence[float | Tensor], wds: Sequence[float], rule: Rule) -> Tensor:
        """The table of the rule's scalars and of each update's lr and wd."""
        numbers: Sequence[Any] = lrs
        pointers: list[tuple[int, int]] = []
        if not {float, int}.issuperset(map(type, lrs)):
            numbers = [0.0 if isinstance(lr, Tensor) else lr for lr in lrs]
            pointers = [(lr.data_ptr(), _bits(lr)) if isinstance(lr, Tensor) else (0, 0) for lr in lrs]

        def make() -> Tensor:
            words = np.zeros(HEADER.value + SETTINGS.value * len(lrs))
            words[:5] = *rule.scalars, rule.decoupled_decay
            each = words[HEADER.value :].reshape(-1, SETTINGS.value)
            each[:, 0] = numbers
            each[:, 1] = wds
            if pointers:
                each.view(np.int64)[:, 2:] = pointers
            return self._upload(words.view(np.int64))

        # By their bits, as those of the rule.
        key = struct.pack(f"{2 * len(lrs)}d", *numbers, *wds), pointers, rule.bits
        return self._recent(self._settings, key, make)

    def _recent(self, kept: list[tuple[Any, T]], key: Any, make: Callable[[], T]) -> T:
        """What ``make`` recently made for ``key``, or makes now; a graph under capture gets its own."""
        if self.is_capturing:
            return make()
        for i, (known, made) in enumerate(kept):
            if known == key:
                if i:
                    kept.insert(0, kept.pop(i))
                return made
        made = make()
        kept.insert(0, (key, made))
        del kept[KEPT:]
        return made

    def _upload(self, words: np.ndarray) -> Tensor:
        """A copy of ``words`` in device memory, made without waiting for it."""
        if self._device.type != "cuda":
            return torch.from_numpy(words.copy())
        # The allocator of pinned memory reuses a buffer only after the copies out of it are done. It may be unable to
        # allocate new memory during a capture, so earlier uploads, on any stream, reserve some.
        if self.is_capturing:
            host = _from_slab(len(words))
            _captured.append(host)
        else:
            host = _pinned(len(words))
            _fill_slab(16 * len(words))
        host.numpy()[:] = words
        return torch.empty(len(host), dtype=torch.int64, device=self._device).copy_(host, non_blocking=True)


def _bits(lr: Tensor) -> int:
    if lr.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"lr: a tensor of {lr.dtype}: must be float32 or float64")
    return 8 * lr.itemsize


def _fill_slab(words: int) -> None:
    """Reserve pinned memory for captures: at least ``words``, and at least half a slab."""
    with _slab_lock:
        if not _slab or len(_slab[0]) < max(words, SLAB // 2):
            _slab[:] = [_pinned(max(words, SLAB))]


def _from_slab(words: int) -> Tensor:
    with _slab_lock:
        if not _slab or len(_slab[0]) < words:
            return _pinned(words)
        taken, _slab[0] = _slab[0][:words], _slab[0][words:]
        return taken


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=True)
