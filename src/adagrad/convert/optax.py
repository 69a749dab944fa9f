"""The ``opt_state`` of ``optax.adagrad``."""

from __future__ import annotations

import functools
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from adagrad import checks
from adagrad.adagrad import AdaGrad
from adagrad.convert.arrays import States, from_arrays, to_arrays
from adagrad.convert.trajectory import count, require_rule, require_schedule
from adagrad.rates import Index


def from_optax(opt_state: Any, optimizer: AdaGrad) -> States:
    """Convert the ``opt_state`` of ``optax.adagrad`` or ``optax.scale_by_rss``, alone or in a chain, to states.

    Parameters
    ----------
    opt_state : ScaleByRssState, or tuples of states with one in it
    optimizer : AdaGrad
        Continues with the states: constructed with ``dialect="optax"`` and the learning rate passed to optax. For a
        schedule, ``learning_rate=None, lr_scheduler=lambda t: float(schedule(t - 1)), begin_num_update=count``.

    Returns
    -------
    dict of int to array
        By parameter number, in the order of ``jax.tree.leaves(params)``.

    Raises
    ------
    ValueError
        If the optimizer has epsilon in another place than optax, or does not continue a schedule from its count, or
        there are transformations with a state that this rule does not have; the message names them.

    Examples
    --------
    >>> from typing import NamedTuple
    >>> import numpy as np
    >>> from adagrad import AdaGrad, convert
    >>> class ScaleByRssState(NamedTuple):  # of optax
    ...     sum_of_squares: dict
    >>> opt_state = (ScaleByRssState({"bias": np.full(2, 0.1, np.float32)}), ())
    >>> convert.from_optax(opt_state, AdaGrad(learning_rate=0.5, dialect="optax"))
    {0: array([0.1, 0.1], dtype=float32)}
    """
    require_rule(optimizer, "optax")
    accumulator, counts = _parts(opt_state)
    leaves = _leaves(accumulator.sum_of_squares)
    if any(map(_is_masked, leaves)):
        why = "a parameter that this part does not update: replace it by None, and number the weights without it"
        raise ValueError(f"opt_state: MaskedNode: {why}")
    states = from_arrays(leaves, optimizer, "optax")
    for step in map(int, counts):
        require_schedule(f"count={step}", step, "optax", optimizer, states)
    return states


def to_optax(states: Mapping[Index, Any], optimizer: AdaGrad, opt_state: Any) -> Any:
    """Return ``opt_state`` with the histories and the update count in it; inverse of :func:`from_optax`.

    Parameters
    ----------
    states : mapping of index to state
        As many as ``jax.tree.leaves(params)``, with the same shapes.
    optimizer : AdaGrad
        The optimizer of the states.
    opt_state : ScaleByRssState, or tuples of states with one in it
        Template for the result, as from ``solver.init(params)``.

    Returns
    -------
    like ``opt_state``
        With NumPy arrays, which JAX accepts directly.

    Raises
    ------
    ValueError
        If the optimizer does not have epsilon under the root, or the shapes of the states differ from those in
        ``opt_state``.
    """
    histories = to_arrays(states, optimizer, "optax")
    accumulator, _ = _parts(opt_state)
    found = [each.shape for each in histories]
    expected = [tuple(np.shape(each)) for each in _leaves(accumulator.sum_of_squares) if not _is_masked(each)]
    if found != expected:
        raise ValueError(
            f"states: shapes {checks.describe(found)}: must be {checks.describe(expected)}, as in opt_state"
        )
    leaves = iter(histories)
    updates = np.asarray(max((count(optimizer, index) for index in states), default=0), np.int32)

    def put(node: Any) -> Any:
        name = type(node).__name__
        if name == "ScaleByRssState":
            return type(node)(_rebuilt(node.sum_of_squares, leaves))
        if name == "ScaleByScheduleState":
            return node._replace(count=updates)
        return node if hasattr(node, "_fields") else type(node)(put(part) for part in node)

    return put(opt_state)


def _parts(opt_state: Any) -> tuple[Any, list[Any]]:
    """Return the one ScaleByRssState in an optax state, and the counts of its schedules."""
    found, counts, rest = [], [], [opt_state]
    while rest:
        part = rest.pop()
        name = type(part).__name__
        if isinstance(part, (tuple, list)) and not hasattr(part, "_fields"):
            rest.extend(part)
        elif name == "ScaleByRssState":
            found.append(part)
        elif name == "ScaleByScheduleState":
            counts.append(part.count)
        elif not _is_empty(part):
            hint = ": convert its inner_state" if hasattr(part, "inner_state") else ""
            if hasattr(part, "inner_states"):
                hint = ": convert inner_states[label].inner_state"
            if hasattr(part, "hyperparams"):
                hint += ", and pass the schedules of its hyperparams to the optimizer"
            raise ValueError(f"opt_state: {name}: not a part of the state of optax.adagrad{hint}")
    if len(found) != 1:
        raise ValueError(f"opt_state: contains {len(found)} ScaleByRssState: must be one")
    return found[0], counts


def _is_empty(part: Any) -> bool:
    """Whether a part of an optax state holds nothing, as that of a transformation without state, masked or not."""
    if isinstance(part, (tuple, list)) and not hasattr(part, "_fields"):
        return all(map(_is_empty, part))
    fields = getattr(part, "_fields", None)
    return fields == () or (fields == ("inner_state",) and _is_empty(part.inner_state))


def _is_masked(leaf: Any) -> bool:
    """Whether it stands for parameters that a part of a solver does not update."""
    return type(leaf).__name__ == "MaskedNode"


# JAX's order: dicts by key; None has no leaves.


def _leaves(tree: Any) -> list[Any]:
    if tree is None:
        return []
    if _is_masked(tree):
        return [tree]
    if isinstance(tree, Mapping):
        tree = [tree[key] for key in _keys(tree)]
    return [leaf for part in tree for leaf in _leaves(part)] if isinstance(tree, (list, tuple)) else [tree]


def _rebuilt(tree: Any, leaves: Iterator[Any]) -> Any:
    if tree is None:
        return None
    if isinstance(tree, Mapping):
        kind: Any = type(tree)
        if isinstance(tree, defaultdict):
            kind = functools.partial(kind, tree.default_factory)
        return kind({key: _rebuilt(tree[key], leaves) for key in _keys(tree)})
    if isinstance(tree, (list, tuple)):
        parts = [_rebuilt(part, leaves) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return next(leaves)


def _keys(tree: Mapping[Any, Any]) -> list[Any]:
    return list(tree) if isinstance(tree, OrderedDict) else sorted(tree)
