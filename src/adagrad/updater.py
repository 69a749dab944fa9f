"""The updater: an optimizer with the states of its weights, and their checkpoints."""

from __future__ import annotations

import io
import os
import re
import sys
from typing import IO, Any, Generic, TypeVar

import numpy as np

from adagrad import checks
from adagrad.arguments import as_lists, kind_of
from adagrad.arrays import format_of, operand
from adagrad.optimizer import Optimizer
from adagrad.rates import Index, check_indices
from adagrad.rule import is_torch

OptimizerT = TypeVar("OptimizerT", bound=Optimizer)


class Updater(Generic[OptimizerT]):
    """Apply an optimizer to weights by index and own their states, like ``mxnet.optimizer.Updater`` (2.0).

    Parameters
    ----------
    optimizer : Optimizer

    Attributes
    ----------
    states : dict of index to state
        Created by the optimizer when an index is first seen. Any writable array of the same dtype and shape may take a
        state's place, such as a ``numpy.memmap``; loading puts arrays in memory there again.

    Notes
    -----
    Threads may update different weights at once, each through an updater and an optimizer of its own: counts are not
    protected.

    Examples
    --------
    >>> import numpy as np
    >>> from adagrad import AdaGrad, get_updater
    >>> updater = get_updater(AdaGrad(learning_rate=0.5))
    >>> weight = np.ones(2, np.float32)
    >>> updater(0, np.array([1.0, -1.0], np.float32), weight)
    >>> weight
    array([0.5000005, 1.4999995], dtype=float32)
    """

    def __init__(self, optimizer: OptimizerT) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer={checks.describe(optimizer)}: must be an adagrad.Optimizer")
        self.optimizer: OptimizerT = optimizer
        self.states: dict[Index, Any] = {}
        # States not used since loading, and whether rows may change; a state replaced since then does not count.
        self._loaded: dict[Index, tuple[Any, bool]] = {}

    def __repr__(self) -> str:
        return f"Updater({self.optimizer!r}, <{len(self.states)} states>)"

    def __call__(self, index: Any, grad: Any, weight: Any) -> None:
        """Update ``weight`` with ``grad``, or each of a list of weights; note MXNet's order of the arguments.

        ``optimizer.aggregate_num`` weights are passed to one step, or all if that makes no difference.

        Parameters
        ----------
        index : int or str, or a list of them
            Keys of the weights; unique within a call. A weight's state is created when its key is first seen.
        grad : array, RowSparse or sparse COO tensor, or a list of them
            Each with its weight's shape and dtype, or float32 for a float16 or bfloat16 weight. Never modified.
        weight : array, or a list of arrays
            NumPy arrays or torch tensors of any shape and strides; float16, bfloat16, float32 or float64. Updated in
            place.

        Raises
        ------
        TypeError, ValueError, IndexError, MemoryError
            As of :meth:`Optimizer.update`; no weight, state or count is changed, whatever the position of the invalid
            one. (Exceptions: row ids on CUDA, and memory, see there; an overridden step that raises; a custom scheduler
            or overridden rates that return an invalid value, since these are asked once for each weight, in order.)
        """
        is_list = isinstance(index, (list, tuple))
        indices, weights, grads, _ = as_lists(index, weight, grad, [None] * len(index) if is_list else None)
        indices = [each.decode() if isinstance(each, bytes) else each for each in indices]
        new: dict[Index, Any] = {}
        for k, (each, w) in enumerate(zip(indices, weights, strict=True)):
            if each not in self.states:
                try:
                    new[each] = self.optimizer.create_state_multi_precision(each, w)
                except (TypeError, ValueError):
                    check_indices(indices)
                    operand(f"weights[{k}]" if is_list else "weight", w)  # says which one is wrong, if it is that
                    raise
        for each, w in zip(indices, weights, strict=True) if self._loaded else ():
            loaded, resize = self._loaded.get(each, (None, False))
            if loaded is not None and loaded is self.states.get(each):
                fresh = self.optimizer.create_state_multi_precision(each, w)
                new[each] = _adopted(f"states[{each!r}]", loaded, fresh, resize=resize)
        states = [new[each] if each in new else self.states[each] for each in indices]
        n, optimizer = len(indices), self.optimizer
        together = n if n == 1 or optimizer._may_take_all_at_once() else int(min(optimizer.aggregate_num, n))
        size = max(together, 1)
        if size < n:
            optimizer._check(indices, weights, grads, states)
        try:
            for start in range(0, n, size):
                part = slice(start, start + size)
                optimizer.update_multi_precision(indices[part], weights[part], grads[part], states[part])
                self._keep(indices[part], new)  # even if a custom step raises later
        except BaseException as error:
            # The weights may have been updated: an interrupt is noticed only after the kernels have finished, and
            # memory may be short for one row-sparse weight of several.
            if isinstance(error, MemoryError) or not isinstance(error, Exception):
                self.states.update(new)
            raise

    def _keep(self, indices: list[Index], new: dict[Index, Any]) -> None:
        """Store the ``new`` states of indices that have been updated."""
        self.states.update({index: new[index] for index in indices if index in new} if new else ())
        for index in indices if self._loaded else ():
            self._loaded.pop(index, None)

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def get_states(self, dump_optimizer: bool = False) -> bytes:
        """Return the states as safetensors bytes; with hyper-parameters, counts and schedule if ``dump_optimizer``.

        Without it, counts start again at ``begin_num_update`` when the states are loaded in a new process, and so does
        a schedule.

        Custom schedulers (not from :mod:`adagrad.lr_scheduler`), ``param_dict`` and ``sym`` are never saved; attributes
        that a subclass adds only if it overrides :meth:`Optimizer.config`.
        """
        from adagrad import checkpoint

        return checkpoint.encode(self.states, self.optimizer.config() if dump_optimizer else None)

    def set_states(self, states: bytes, *, resize_rows: bool = False) -> None:
        """Restore what :meth:`get_states`, or ``Updater.get_states`` of MXNet 2.0 or 1.x, returned.

        The optimizer stays the same object and must be of the class that was saved; the saved hyper-parameters are set
        on it, but a user-defined scheduler of its own is kept. States are restored as NumPy arrays, and move to the
        weights' device when they are next used.

        Parameters
        ----------
        states : bytes
        resize_rows : bool, default False
            Whether a state may be used for a weight with more or fewer rows. Rows that the weight no longer has are
            dropped; new rows are initialised by :meth:`Optimizer.create_state`.

        Raises
        ------
        TypeError
            If ``states`` is not bytes.
        ValueError
            If the bytes are truncated, altered, not a state file, of a newer version or of another optimizer class, or
            if a state has another dtype or shape than the one here (apart from its rows if ``resize_rows``), or a
            history of AdaGrad is negative anywhere, as momentum from MXNet's files is; nothing is changed.
        """
        if not isinstance(states, (bytes, bytearray, memoryview)):
            raise TypeError(f"states={checks.describe(states)}: must be bytes, not {type(states).__name__}")
        self._load(io.BytesIO(bytes(states)), resize_rows=resize_rows)

    def _load(self, file: IO[bytes], *, resize_rows: bool) -> None:
        from adagrad import checkpoint, mxnet_states
        from adagrad.adagrad import AdaGrad
        from adagrad.group_adagrad import GroupAdaGrad

        if mxnet_states.is_mxnet_states(_ends(file)):
            loaded, found_optimizer = mxnet_states.decode(file.read())
            config = None if found_optimizer is None else found_optimizer.config()
        else:
            loaded, config = checkpoint.read(file)
        for index in loaded.keys() & self.states.keys():
            given = loaded[index], self.states[index]
            found, expected = (_forms(state, any_rows=resize_rows) for state in given)
            if found != expected:
                differ_in_rows = len({_forms(state, any_rows=True) for state in given}) == 1
                hint = "; resize_rows=True lets the number of rows change" if differ_in_rows else ""
                raise ValueError(f"states[{index!r}]: {found}: must be {expected}, like this updater's{hint}")
        if type(self.optimizer) in (AdaGrad, GroupAdaGrad):  # the states of a subclass may be anything
            for index, state in loaded.items():
                _check_history(f"states[{index!r}]", state)
        if config is not None:
            self.optimizer.set_config(config)
        self.states = dict(loaded)
        self._loaded = {index: (state, resize_rows) for index, state in loaded.items()}

    def save_states(self, path: str | os.PathLike[str], dump_optimizer: bool = False) -> None:
        """Write what :meth:`get_states` returns to a file, through a temporary file that is renamed when complete.

        At most one array at a time is copied, if it is not contiguous, not little-endian or on a device.
        """
        from adagrad import atomic_file, checkpoint

        if type(self).get_states is not Updater.get_states:
            atomic_file.save(path, self.get_states(dump_optimizer))
            return
        with atomic_file.replacing(path) as file:
            checkpoint.write(file, self.states, self.optimizer.config() if dump_optimizer else None)

    def load_states(self, path: str | os.PathLike[str], *, resize_rows: bool = False) -> None:
        """Do what :meth:`set_states` does with the content of a file; errors name the file.

        The arrays are new, beside those of the states that they replace. Only pipes and MXNet's files are read whole.
        """
        with open(path, "rb") as file:
            try:
                if type(self).set_states is not Updater.set_states:
                    self.set_states(file.read(), resize_rows=resize_rows)
                else:
                    self._load(file if file.seekable() else io.BytesIO(file.read()), resize_rows=resize_rows)
            except ValueError as error:
                raise ValueError(f"{os.fspath(path)}: {error}") from error


def _ends(file: IO[bytes]) -> bytes:
    """The first nine bytes and the last, which tell MXNet's files from ours; reading starts from the beginning."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 1, 0))
    last = file.read(1)
    file.seek(0)
    first = file.read(9)
    file.seek(0)
    return first + last


def _check_history(at: str, state: Any) -> None:
    """Refuse what is no sum of squares. A file from MXNet does not say by itself which optimizer wrote it."""
    history = state[-1] if isinstance(state, (tuple, list)) and state else state
    if isinstance(history, np.ndarray) and (least := np.fmin.reduce(history, axis=None, initial=0)) < 0:
        raise ValueError(f"{at}: {least}: a history must be >= 0; was it written by AdaGrad?")


def _forms(state: Any, *, any_rows: bool) -> str:
    """Describe the dtype and shape of each array of a state, for messages; the number of rows as n if ``any_rows``."""
    if isinstance(state, (tuple, list)):
        return f"({', '.join(_forms(each, any_rows=any_rows) for each in state)})"
    if state is None:
        return "None"
    if not (isinstance(state, np.ndarray) or is_torch(state)):
        return type(state).__name__  # of a custom optimizer
    shape = str(tuple(state.shape))
    return f"{format_of(state)} of shape {re.sub('[0-9]+', 'n', shape, count=1) if any_rows else shape}"


def _adopted(at: str, loaded: Any, fresh: Any, *, resize: bool) -> Any:
    """Return a loaded state in the structure of a ``fresh`` one, each array converted by :func:`_into`."""
    entries = [len(each) if isinstance(each, (tuple, list)) else None for each in (loaded, fresh)]
    if entries[0] != entries[1]:
        why = "for this weight; is multi_precision as it was when the states were saved?"
        raise ValueError(f"{at}: {kind_of(loaded)}: must be {kind_of(fresh)}, {why}")
    if entries[1] is None:
        return _into(loaded, fresh, resize=resize)
    adopted = [_adopted(f"{at}[{k}]", *pair, resize=resize) for k, pair in enumerate(zip(loaded, fresh, strict=True))]
    return tuple(adopted) if isinstance(fresh, tuple) else adopted


def _into(loaded: Any, fresh: Any, *, resize: bool) -> Any:
    """Return ``loaded`` with the array type, the device and, if it may be resized, the rows of ``fresh``."""
    if loaded is None or fresh is None:
        return loaded
    if is_torch(fresh):
        torch = sys.modules["torch"]
        if not is_torch(loaded):
            is_bfloat16 = loaded.dtype.name == "bfloat16"  # which PyTorch does not accept from NumPy
            loaded = torch.from_numpy(loaded.view(np.int16) if is_bfloat16 else loaded)
            loaded = loaded.view(torch.bfloat16) if is_bfloat16 else loaded
        loaded = loaded.to(fresh.device)
    before, now = tuple(loaded.shape), tuple(fresh.shape)
    if not resize or before == now or before[1:] != now[1:] or not now or loaded.dtype != fresh.dtype:
        return loaded  # a mismatch is refused by the update
    rows = min(before[0], now[0])
    fresh[:rows] = loaded[:rows]
    return fresh


def get_updater(optimizer: OptimizerT) -> Updater[OptimizerT]:
    """Return an :class:`Updater` for ``optimizer``."""
    return Updater(optimizer)
