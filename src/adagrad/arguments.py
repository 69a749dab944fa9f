"""The arguments of an update: its lists, the structure of states, gradients of low-precision weights."""

from __future__ import annotations

from typing import Any

from adagrad import checks, kernels
from adagrad.arrays import LOW_PRECISION, Operand, format_of, operand, refuse_shared_memory, refuse_unwritable
from adagrad.kernels.names import in_lists
from adagrad.row_sparse import RowSparse
from adagrad.rule import Array, cast


def as_lists(indices: Any, weights: Any, grads: Any, states: Any) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """Return the arguments of an update as lists of equal length; indices must be hashable and distinct."""
    if not isinstance(indices, (list, tuple)):
        if isinstance(weights, (list, tuple)):
            raise TypeError(f"indices={checks.describe(indices)}: must be a list, like weights")
        indices, weights, grads, states = [indices], [weights], [grads], [states]
    n = len(indices)
    if not (type(weights) is type(grads) is type(states) is list and len(weights) == len(grads) == len(states) == n):
        for name, values in (("weights", weights), ("grads", grads), ("states", states)):
            if not isinstance(values, (list, tuple)):
                raise TypeError(f"{name}={checks.describe(values)}: must be a list, like indices")
            if len(values) != n:
                raise ValueError(f"{name}: {len(values)} entries: must be {n}, as many as indices")
    try:
        distinct = len(set(indices)) == n
    except TypeError:
        raise TypeError(f"indices={checks.describe(indices)}: must be integers or strings") from None
    if not distinct:
        raise ValueError(f"indices={checks.describe(indices)}: must be distinct within one call")
    # Copies of the lists: another thread that changes the caller's cannot free arrays in use.
    return list(indices), list(weights), list(grads), list(states)


def kind_of(state: Any) -> str:
    """Describe the structure of a state, for messages."""
    if not isinstance(state, (tuple, list)):
        return "one history"
    return "a pair (master copy, history)" if len(state) == 2 else f"{len(state)} entries"


def require_masters(weights: list[Any], states: list[Any]) -> None:
    """ValueError for a low-precision weight whose state has no master copy."""
    for i, (weight, state) in enumerate(zip(weights, states, strict=True)):
        if isinstance(state, (tuple, list)) or state is None:  # None is refused elsewhere, for any weight
            continue
        # The size is asked first, which is fast.
        if getattr(getattr(weight, "dtype", None), "itemsize", 0) == 2 and format_of(weight) in LOW_PRECISION:
            need = "must be a pair (master copy, history), as create_state_multi_precision returns it"
            raise ValueError(f"{in_lists(i).state}: {kind_of(state)}: {need} with multi_precision=True")


def check_low_precision(which: list[int], weights: list[Any], grads: list[Any], states: list[Any]) -> None:
    """Check what no step sees: low-precision weights and gradients, before these are cast up and masters down."""
    written: list[Operand] = []
    read: list[Operand] = []
    for i in which:
        names, state = in_lists(i), states[i]
        weight = operand(names.weight, weights[i])
        if not isinstance(state, (tuple, list)) or len(state) != 2:
            raise ValueError(f"{names.state}: {kind_of(state)}: must be a pair (master copy, state), for this weight")
        master = operand(names.master, state[0])
        if master.shape != weight.shape:
            raise ValueError(f"{master.name}: shape {master.shape}: must be {weight.shape}")
        refuse_unwritable(weight)
        refuse_unwritable(master)
        grad = kernels.check_gradient(names, grads[i], weight)
        written += [weight, master]
        read.append(grad)
    refuse_shared_memory(written, read)


def cast_gradient(grad: Any, like: Array) -> Any:
    if isinstance(grad, RowSparse):
        return RowSparse(cast(grad.values, like), grad.indices, grad.shape)
    return cast(grad, like)
