"""The ``opt_state`` of ``optax.adagrad``.

Its trees are JAX's, which is imported when there is one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from adagrad import checks
from adagrad.adagrad import AdaGrad
from adagrad.convert.arrays import States, from_arrays, to_arrays
from adagrad.convert.trajectory import count, require_rate, require_rule, require_schedule
from adagrad.rates import Index


def from_optax(opt_state: Any, optimizer: AdaGrad) -> States:
    """Convert the ``opt_state`` of ``optax.adagrad`` or ``optax.scale_by_rss``, alone or in a chain, to states.

    Parameters
    ----------
    opt_state : ScaleByRssState, or tuples of states with one in it, also of ``optax.inject_hyperparams``
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
        If the optimizer has epsilon in a different place from optax, or does not continue a schedule from its count, or
        differs from the hyper-parameters that were injected, or there are transformations with a state that this rule
        does not have; the message names them.

    Examples
    --------
    >>> import numpy as np
    >>> import optax
    >>> from adagrad import AdaGrad, convert
    >>> opt_state = optax.adagrad(0.5).init({"bias": np.ones(2, np.float32)})
    >>> convert.from_optax(opt_state, AdaGrad(learning_rate=0.5, dialect="optax"))
    {0: array([0.1, 0.1], dtype=float32)}
    """
    require_rule(optimizer, "optax")
    accumulator, counting = _parts(opt_state)
    from jax import tree

    leaves = tree.leaves(accumulator.sum_of_squares, is_leaf=_is_masked)
    if any(map(_is_masked, leaves)):
        why = "a parameter that this part does not update: replace it by None, and number the weights without it"
        raise ValueError(f"opt_state: MaskedNode: {why}")
    states = from_arrays(leaves, optimizer, "optax")
    for part in counting:
        _require_rates(part, int(_number("count", part.count)), optimizer, states)
    return states


def to_optax(states: Mapping[Index, Any], optimizer: AdaGrad, opt_state: Any) -> Any:
    """Return ``opt_state`` with the histories and the update count in it; inverse of :func:`from_optax`.

    Parameters
    ----------
    states : mapping of index to state
        As many as ``jax.tree.leaves(params)``, with the same shapes.
    optimizer : AdaGrad
        The optimizer of the states.
    opt_state : ScaleByRssState, or tuples of states with one in it, also of ``optax.inject_hyperparams``
        Template for the result, as from ``solver.init(params)``.

    Returns
    -------
    like ``opt_state``
        With NumPy arrays, which JAX accepts directly.

    Raises
    ------
    ValueError
        If the optimizer does not have epsilon under the root, or the shapes of the states differ from those in
        ``opt_state``, or only one of the two has a schedule, or other hyper-parameters were injected. (A scheduler here
        and a constant rate that was injected need only be equal at the next update.)
    """
    histories = to_arrays(states, optimizer, "optax")
    accumulator, counting = _parts(opt_state)
    from jax import tree

    leaves, structure = tree.flatten(accumulator.sum_of_squares)
    found, expected = ([np.shape(each) for each in arrays] for arrays in (histories, leaves))
    if found != expected:
        raise ValueError(
            f"states: shapes {checks.describe(found)}: must be {checks.describe(expected)}, as in opt_state"
        )
    updates = max((count(optimizer, index) for index in states), default=0)
    current = [index for index in states if count(optimizer, index) == updates]
    for part in counting:
        _require_rates(part, updates, optimizer, current)
    if optimizer.lr_scheduler is not None and not counting and opt_state is not accumulator:
        raise ValueError(
            "opt_state: has no schedule: must have the optimizer's: make the solver with a schedule, "
            "lambda n: lr_scheduler(n + 1), since optax counts from 0"
        )

    def counted(part: Any) -> Any:  # Flax wraps counts, too
        return part._replace(count=tree.map(lambda _: np.asarray(updates, np.int32), part.count))

    def put(node: Any) -> Any:
        name = type(node).__name__
        if name == "ScaleByRssState":
            return type(node)(tree.unflatten(structure, histories))
        if name == "ScaleByScheduleState":
            return counted(node)
        if name == "InjectStatefulHyperparamsState":
            schedules = {key: counted(each) for key, each in node.hyperparams_states.items()}
            return counted(node)._replace(hyperparams_states=schedules, inner_state=put(node.inner_state))
        return node if hasattr(node, "_fields") else type(node)(put(part) for part in node)

    return put(opt_state)


def _parts(opt_state: Any) -> tuple[Any, list[Any]]:
    """Return the one ScaleByRssState in an optax state, and the states that count updates."""
    found, counting, rest = [], [], [opt_state]
    while rest:
        part = rest.pop()
        name = type(part).__name__
        if isinstance(part, (tuple, list)) and not hasattr(part, "_fields"):
            rest.extend(part)
        elif name == "ScaleByRssState":
            found.append(part)
        elif name == "ScaleByScheduleState":
            counting.append(part)
        elif name == "InjectStatefulHyperparamsState":
            counting.append(part)
            rest.append(part.inner_state)
        elif not _is_empty(part):
            raise ValueError(f"opt_state: {name}: not a part of the state of optax.adagrad{_hint(part)}")
    if len(found) != 1:
        raise ValueError(f"opt_state: contains {len(found)} ScaleByRssState: must be one")
    return found[0], counting


def _hint(part: Any) -> str:
    """Return what to convert instead of this part, if that is known."""
    if hasattr(part, "hyperparams"):  # of optax before 0.1.9, which does not say what is a schedule
        return (
            ": convert its inner_state, with the epsilon and learning_rate in its hyperparams, or, for a schedule, "
            f"begin_num_update={part.count}"
        )
    hints = {
        "inner_opt_state": "convert its inner_opt_state, when its mini_step is 0",
        "inner_states": "convert inner_states[label].inner_state",
        "inner_state": "convert its inner_state",
        "opt_state": "convert its opt_state",
    }
    for name, hint in hints.items():
        if hasattr(part, name):
            return f": {hint}"
    if part is None or isinstance(part, Mapping):
        return ": restore what is from a file into solver.init(params); of a named_chain, convert the list of values"
    return ""


def _number(what: str, value: Any) -> float:
    """Return a number in a state, which Flax may have wrapped."""
    from jax import tree

    (array,) = tree.leaves(value)
    if np.ndim(array) != 0:
        raise ValueError(
            f"{what}: shape {np.shape(array)}: must be (): of a replicated state, convert one copy: "
            "jax.tree.map(lambda each: each[0], opt_state)"
        )
    return float(array)


def _require_rates(part: Any, step: int, optimizer: AdaGrad, indices: Iterable[Index]) -> None:
    """Check that the optimizer has the hyper-parameters that were injected, and continues schedules after ``step``.

    What was injected for a schedule is of the last update, not of the next.
    """
    hyperparams = getattr(part, "hyperparams", {})
    schedules = getattr(part, "hyperparams_states", {"learning_rate": part})
    for name, schedule in schedules.items():
        if getattr(schedule, "_fields", None) != ("count",) or name != "learning_rate":
            raise ValueError(f"hyperparams_states[{name!r}]: must be a learning rate that depends on the count alone")
    eps = _number("eps", hyperparams.get("eps", optimizer.epsilon))
    if not math.isclose(eps, optimizer.epsilon, rel_tol=1e-7):  # the rounding to float32
        raise ValueError(
            f"eps={np.float32(eps)!s} in hyperparams: must be the optimizer's epsilon, which is {optimizer.epsilon}"
        )
    if schedules:
        require_schedule(f"count={step}", step, "optax", optimizer, indices)
    elif "learning_rate" in hyperparams:
        lr = _number("learning_rate", hyperparams["learning_rate"])
        for index in indices:
            require_rate(f"parameter {index}", lr, 0.0, step, optimizer, index)


def _is_empty(part: Any) -> bool:
    """Whether a part of an optax state holds nothing, as that of a transformation without state, masked or not."""
    if isinstance(part, (tuple, list)) and not hasattr(part, "_fields"):
        return all(map(_is_empty, part))
    fields = getattr(part, "_fields", None)
    return fields == () or (fields == ("inner_state",) and _is_empty(part.inner_state))


def _is_masked(leaf: Any) -> bool:
    """Whether it stands for parameters that a part of a solver does not update."""
    return type(leaf).__name__ == "MaskedNode"
