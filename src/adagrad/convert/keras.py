"""The variables of ``keras.optimizers.Adagrad``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from adagrad import checks
from adagrad.adagrad import AdaGrad
from adagrad.convert.arrays import States, history, plain, to_arrays
from adagrad.convert.trajectory import count, require_rate, require_rule, require_schedule
from adagrad.rates import Index


def from_keras(variables: Iterable[Any], optimizer: AdaGrad) -> States:
    """Convert the ``variables`` of ``keras.optimizers.Adagrad``, of Keras 3 on any backend, to states.

    Parameters
    ----------
    variables : iterable
        ``keras_optimizer.variables``, or only the accumulators, as arrays.
    optimizer : AdaGrad
        Continues with the states: constructed with ``dialect="keras"`` and the learning rate in the variables. For a
        schedule, ``learning_rate=None, lr_scheduler=lambda t: float(schedule(t - 1)), begin_num_update=iterations``.

    Returns
    -------
    dict of int to array
        By variable number, in the order of ``model.trainable_variables``.

    Raises
    ------
    ValueError
        If the optimizer has epsilon or weight decay in another place than Keras, another learning rate than the
        variables, or does not continue a schedule from their iteration; if the variables are of another optimizer, or
        Keras has accumulated gradients that are not applied yet.

    Examples
    --------
    >>> import numpy as np
    >>> from adagrad import AdaGrad, convert
    >>> convert.from_keras([np.full(2, 0.1, np.float32)], AdaGrad(learning_rate=0.5, dialect="keras"))
    {0: array([0.1, 0.1], dtype=float32)}
    """
    require_rule(optimizer, "keras")
    named = _named(variables)
    names = {name for name, _ in named}
    found = []
    for name, each in named:
        if _belongs(name, "_gradient_accumulator", names):
            if np.any(plain(each)):
                raise ValueError(f"{name}: gradients that are not applied yet: convert right after an update")
        elif name.endswith("accumulator"):
            found.append((name, each))
        elif name not in ("iteration", "learning_rate") and not _belongs(name, "_average", names):
            need = "must be those of keras.optimizers.Adagrad; for a wrapper, those of its inner_optimizer"
            raise ValueError(f"variables: {name!r}: {need}")
    if named and not found:
        raise ValueError(
            f"variables: none of {len(named)} is an accumulator: must be those of keras.optimizers.Adagrad"
        )
    states: States = {index: history(name, each, optimizer) for index, (name, each) in enumerate(found)}
    scalars = {name: plain(each) for name, each in named if name in ("iteration", "learning_rate")}
    step = int(scalars.get("iteration", 0))
    if "learning_rate" in scalars:
        for index in states:
            require_rate(f"variable {index}", float(scalars["learning_rate"]), 0.0, step, optimizer, index)
    elif "iteration" in scalars:
        require_schedule(f"iteration={step}", step, "Keras", optimizer, states)
    return states


def _belongs(name: str, ending: str, names: set[str]) -> bool:
    """Whether a variable with this name ending belongs to an accumulator."""
    return name.endswith(ending) and f"{name.removesuffix(ending)}_accumulator" in names


def to_keras(states: Mapping[Index, Any], optimizer: AdaGrad, variables: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Return what to assign to the variables of an optimizer of Keras 3; inverse of :func:`from_keras`.

    Parameters
    ----------
    states : mapping of index to state
    optimizer : AdaGrad
        The optimizer of the states.
    variables : iterable
        ``keras_optimizer.variables``, once it has been built for the weights of the states, in the same order.

    Returns
    -------
    list of (variable, value)
        For ``variable.assign(value)``: the accumulators, and the iteration, from which a schedule continues.

    Raises
    ------
    ValueError
        If the optimizer has epsilon or weight decay in another place than Keras, or another learning rate than the
        variables; if there are row-wise histories or master copies, which Keras does not have; if the accumulators are
        not as many as the states, or of other shapes; if Keras accumulates gradients: then its iteration counts
        batches.
    """
    histories = to_arrays(states, optimizer, "keras")
    named = _named(variables)
    names = {name for name, _ in named}
    accumulators = [each for name, each in named if name.endswith("accumulator")]
    if len(accumulators) > len(histories) and any(_belongs(name, "_gradient_accumulator", names) for name in names):
        raise ValueError("variables: of an optimizer with gradient_accumulation_steps: must be of one without")
    found = [tuple(each.shape) for each in accumulators]
    expected = [each.shape for each in histories]
    if found != expected:
        raise ValueError(
            f"variables: accumulators of shapes {checks.describe(found)}: must be {checks.describe(expected)}, the "
            "states'"
        )
    updates = max((count(optimizer, index) for index in states), default=0)
    for name, each in named:
        if name == "learning_rate":
            for index in states:
                require_rate(f"variable {index}", float(plain(each)), 0.0, updates, optimizer, index)
    iteration = [(each, updates) for name, each in named if name == "iteration"]
    return [*zip(accumulators, histories, strict=True), *iteration]


def _named(variables: Any) -> list[tuple[str, Any]]:
    """The variables with their names; an array is taken for an accumulator."""
    try:
        return [(getattr(each, "name", None) or "accumulator", each) for each in variables]
    except TypeError:
        raise TypeError(f"variables={checks.describe(variables)}: must be optimizer.variables") from None
