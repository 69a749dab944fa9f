"""Updates of torch tensors on one CUDA device, called by the dispatcher after all checks on the host.

A call launches one kernel for each format of dense tensors, and for all row-sparse gradients of one form a check of
their row ids, a sort and one or three kernels. It neither waits for the device nor copies anything back from it. What
can fail on the host, such as compiling a kernel, is done before the first kernel that changes anything is launched.

Kernels read their parameters from tables in device memory: the addresses of the dense tensors, those of several
row-sparse updates, and the settings (the rule's scalars, lr and wd). A table is uploaded, from pinned memory and
without waiting, only if no recent call used the same one; dense launches are kept with their tables. While a CUDA graph
is captured, the tables are the graph's own: it copies them from pinned memory at each replay, so that later calls
cannot change them. Hyper-parameters that are Python numbers are then frozen into the graph; an lr that is a tensor is
read by each replay.

An id outside the weight turns the whole call into a no-op, on the device. The kernel that meets one writes it into
pinned host memory; the next call raises IndexError if that has arrived, and :func:`check` waits for it. If two such
calls are in flight at once, the report of the second may be mixed with that of the first.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from adagrad.kernels import cuda_dense, cuda_row_lists
from adagrad.kernels.cuda_dense import DenseUpdates
from adagrad.kernels.cuda_row_lists import RowUpdates
from adagrad.kernels.cuda_rule import HEADER, SETTINGS

if TYPE_CHECKING:
    from adagrad.rule import Rule

T = TypeVar("T")

KEPT = 16
"""Tables of one kind that are kept for later calls on the same stream."""

FLAGS = 64
"""Numbers that are set to 0 at once, one for each call with row ids."""

NO_ROW = int(np.iinfo(np.int64).min)


class Group(NamedTuple):
    """Updates under one rule."""

    rule: Rule
    dense: DenseUpdates | None
    rows: RowUpdates | None


def prepare(
    groups: Sequence[Group],
    device: torch.device,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Callable[[], Tensor | None]:
    """Prepare an AdaGrad step (Duchi, Hazan, Singer, JMLR 12, 2011) of tensors on one CUDA device, in place.

    Parameters
    ----------
    groups : sequence of Group
    device : torch.device
        Where all tensors are; no weight, history or master copy shares memory with anything else in the call.
    grad_scale : Tensor, optional
        One number on the device; each gradient (for rows: each sum of a row's occurrences) is divided by it first.
    found_inf : Tensor, optional
        One number on the device; if it is not 0, the call changes nothing.

    Returns
    -------
    callable
        Carries it out, on the stream that is current now. If there are row ids, which the device is already checking,
        it returns a number on the device that is not 0 if one of them is outside its weight; else None.

    Raises
    ------
    TypeError
        An lr on the device is neither float32 nor float64.
    Exception
        Whatever compiling a kernel, or a lack of memory, may raise.
    """
    with _on(device):
        tables, skip = _tables_of(device), None
        launches: list[Callable[..., list[Callable[[], object]]]] = []
        for rule, dense, rows in groups:
            lrs, wds = dense.rates() if dense else ([], [])
            row_lrs, row_wds = rows.rates() if rows else ([], [])
            settings = tables.settings([*lrs, *row_lrs], [*wds, *row_wds], rule)
            if dense:
                addresses, found = tables.addresses(dense)
                launches.append(partial(tables.dense_launches, addresses, found, settings))
            if rows:
                for form, which in cuda_row_lists.by_form(rows, rule).items():
                    # Every id of the call is checked before the first element changes.
                    skip = tables.flag() if skip is None else skip
                    report = _report_of(device).tensor
                    launch = cuda_row_lists.sort_ids(rows, form, which, len(lrs), skip, report, tables.rows)
                    launches.append(partial(cuda_row_lists.bind, launch, settings))
        bound = [start for launch in launches for start in launch(grad_scale, skip, found_inf)]
    return partial(_carry_out, bound, device, skip, groups)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Within, a CUDA device is the current one, as it usually is: to make it so takes longer than to ask."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return _NOTHING
    return torch.cuda.device(device)


_NOTHING = nullcontext()


def _carry_out(bound: list[Callable[[], object]], device: torch.device, skip: Tensor | None, kept: object
               ) -> Tensor | None:  # fmt: skip
    """Launch the kernels; ``kept`` are tensors that they use by address, some of them known to nobody else."""
    with _on(device):
        for start in bound:
            start()
    return skip


def wait_for_check(device: torch.device) -> None:
    """Raise what a call that has been prepared reports, after waiting for the device to check its row ids.

    Not while a CUDA graph is captured, when nothing is computed yet: then a bad row id stops the kernels alone.
    """
    if device.type == "cuda":
        with _on(device):
            if torch.cuda.is_current_stream_capturing():
                return
            torch.cuda.current_stream().synchronize()
    _raise_reported(_report_of(device).words, arrived=True)


def check(device: torch.device | str | int | None = None) -> None:
    """Wait for the device, or for all devices used so far, and raise what calls of :func:`prepare` reported there.

    Raises
    ------
    IndexError
        A call met a row id outside its weight; that call changed nothing.
    """
    wanted = None if device is None else _with_index(torch.device(device))
    for used, report in list(_reports.items()):
        if wanted is None or used == wanted:
            if used.type == "cuda":
                torch.cuda.synchronize(used)
            _raise_reported(report.words, arrived=True)


# ------------------------------------------------------------------------------------------------- row ids out of range


class _Report(NamedTuple):
    """Host memory that a device can write: (id, rows + 1) of a row id out of range, or (NO_ROW, 0)."""

    tensor: Tensor
    words: memoryview
    """The same memory for Python, which takes longer to read a number from a tensor or an array."""


_reports: dict[torch.device, _Report] = {}


def _with_index(device: torch.device) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


def _report_of(device: torch.device) -> _Report:
    report = _reports.get(device)
    if report is None:
        tensor = torch.tensor([NO_ROW, 0], dtype=torch.int64, device="cpu")
        tensor = tensor.pin_memory() if device.type == "cuda" else tensor
        report = _reports.setdefault(device, _Report(tensor, tensor.numpy().data))
    return report


def raise_reported(device: torch.device) -> None:
    """Raise what earlier calls reported on a device, if that has arrived.

    Called for each device of a call before the call begins.
    """
    _raise_reported(_report_of(device).words, arrived=False)


def _raise_reported(words: memoryview, *, arrived: bool) -> None:
    """Raise what a report says. Its two words arrive one by one: unless ``arrived``, raise only if both are there."""
    row, rows = words[0], words[1] - 1
    if rows < 0 or (row == NO_ROW and not arrived):
        return
    words[1] = 0  # first, so that :func:`check` raises something for a report that arrives meanwhile
    words[0] = NO_ROW
    raise IndexError(f"indices: row {row}: must be in [0, {rows}), the weight's rows; the call changed nothing")


# --------------------------------------------------------------------------------------------------------------- tables


class _Local(threading.local):
    def __init__(self) -> None:
        self.tables: dict[tuple[torch.device, int], _Tables] = {}


_local = _Local()
SLAB = 2**17
"""Words of pinned memory reserved for captures, which may be unable to allocate any; more if tables are large."""

_slab: list[Tensor] = []
"""The unused rest of it, in one tensor; empty before the first reservation."""

_slab_lock = threading.Lock()

_captured: list[Tensor] = []
"""Pinned memory that captured graphs read at each replay; nothing tells when a graph is gone, so it is never freed."""


def _tables_of(device: torch.device) -> _Tables:
    """The tables of this thread and the current stream of ``device``, the current one: work on them is in its order."""
    is_cuda = device.type == "cuda"
    key = device, _stream_of(device.index) if is_cuda else 0
    tables = _local.tables.get(key)
    if tables is None:
        tables = _local.tables[key] = _Tables(device)
    tables.is_capturing = is_cuda and torch.cuda.is_current_stream_capturing()
    return tables


def _current_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


_stream_of: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream)
"""The address of a device's current stream. PyTorch's compiler and Triton ask in this way, which makes no object."""


class _Tables:
    """The last tables that a thread uploaded for one stream."""

    is_capturing = False
    """Whether the call is captured into a graph, which gets tables of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._addresses: list[tuple[Any, tuple[Tensor, list[cuda_dense.Launch]]]] = []
        self._rows: list[tuple[Any, tuple[Tensor, cuda_row_lists.Plan]]] = []
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

    def addresses(self, updates: DenseUpdates) -> tuple[Tensor, list[cuda_dense.Launch]]:
        """The table of addresses and the launches that use it."""

        def make() -> tuple[Tensor, list[cuda_dense.Launch]]:
            words, launches = cuda_dense.plan(updates)
            return self._upload(words), launches

        key = updates.rows.tobytes(), updates.codes.tobytes(), updates.share_rates
        return self._recent(self._addresses, key, make)

    def dense_launches(self, addresses: Tensor, launches: list[cuda_dense.Launch], settings: Tensor,
                       *numbers: Tensor | None) -> list[Callable[[], object]]:  # fmt: skip
        """What carries out the launches, with two tables that are known here; ``numbers`` as in the kernels."""

        def make() -> tuple[list[Callable[[], object]], Tensor, Tensor]:
            bound = [cuda_dense.bind(launch, addresses, settings, *numbers) for launch in launches]
            return bound, addresses, settings  # held, so that no others can have their ids

        if any(number is not None for number in numbers):
            return make()[0]
        return self._recent(self._bound, (id(addresses), id(settings)), make)[0]

    def rows(self, key: Any, plan: Callable[[], cuda_row_lists.Plan]) -> tuple[Tensor, cuda_row_lists.Plan]:
        """The table of several row-sparse updates and the plan for them, which ``key`` determines."""

        def make() -> tuple[Tensor, cuda_row_lists.Plan]:
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
