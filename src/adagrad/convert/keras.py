"""The variables of ``keras.optimizers.Adagrad``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from adagrad import checks
from adagrad.adagrad import AdaGrad
from adagrad.convert.arrays import States, history, plain, to_arrays
from adagrad.convert.trajectory import count, require_rate, require_rule, require_schedule
from adagrad.rates import Index

_SCALARS = ("iteration", "learning_rate", "iteration:0")
_OF_KERAS_2 = re.compile(r"^(?:[^/]+/)?(accumulator|average)/(.+):0$")


def from_keras(variables: Iterable[Any], optimizer: AdaGrad, *, gradient_accumulation_steps: int = 1) -> States:
    """Convert the ``variables`` of ``keras.optimizers.Adagrad`` to states: of Keras 3 on any backend, or Keras 2.

    Parameters
    ----------
    variables : iterable
        ``keras_optimizer.variables``, or only the accumulators, as arrays.
    optimizer : AdaGrad
        Continues with the states: constructed with ``dialect="keras"`` and the learning rate in the variables. For a
        schedule, ``learning_rate=None, lr_scheduler=lambda t: float(schedule(t - 1)), begin_num_update=iterations``.
    gradient_accumulation_steps : int, default 1
        Keras's. With ``n``, its iteration and its schedule count batches, of which each ``n``-th is an update: pass
        ``lr_scheduler=lambda t: float(schedule(n * t - 1)), begin_num_update=iteration // n``.

    Returns
    -------
    dict of int to array
        By variable number, in the order of ``model.trainable_variables``.

    Raises
    ------
    ValueError
        If the optimizer has epsilon or weight decay in a different place from Keras, another learning rate than the
        variables, or does not continue a schedule from their iteration; if the variables are of another optimizer, or
        of one that is not built; or if Keras has accumulated gradients that are not applied yet. Variables of Keras 2
        hold no learning rate: only an ``lr_scheduler`` is checked to continue from their iteration.

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
        elif name not in _SCALARS and not _belongs(name, "_average", names):
            need = "must be those of keras.optimizers.Adagrad; for a wrapper, those of its inner_optimizer"
            raise ValueError(f"variables: {name!r}: {need}")
    if named and not found:
        raise ValueError(
            f"variables: none of {len(named)} is an accumulator: must be those of keras.optimizers.Adagrad, once it is "
            "built: call its build(model.trainable_variables)"
        )
    states: States = {index: history(name, each, optimizer) for index, (name, each) in enumerate(found)}
    batches = checks.integer("gradient_accumulation_steps", gradient_accumulation_steps, 1)
    _require_rates(named, states, optimizer, batches)
    return states


def _require_rates(named: list[tuple[str, Any]], states: States, optimizer: AdaGrad, batches: int) -> None:
    """Check that the optimizer continues with the learning rate in the variables, or with a schedule from there."""
    scalars = {name: plain(each) for name, each in named if name in _SCALARS}
    step = int(scalars.get("iteration", scalars.get("iteration:0", 0)))
    has_rate = "learning_rate" in scalars
    # In Keras 3 a schedule has no variable for the rate; in Keras 2 a constant has none, either.
    scheduled = bool(scalars) and (optimizer.lr_scheduler is not None or ("iteration" in scalars and not has_rate))
    what = f"iteration={step}"
    if scheduled:
        step = _updates(step, named, batches)
    if has_rate:
        for index in states:
            require_rate(f"variable {index}", float(scalars["learning_rate"]), 0.0, step, optimizer, index)
    elif scheduled:
        require_schedule(what, step, "Keras", optimizer, states, batches)


def _updates(iteration: int, named: list[tuple[str, Any]], batches: int) -> int:
    """Return how many updates there were after ``iteration`` batches."""
    names = {name for name, _ in named}
    if _accumulates(names) != (batches > 1):
        need = "must be 1: there are no gradient accumulators"
        if batches == 1:
            need = (
                "must be Keras's n, since its iteration and its schedule count batches: pass that, and an optimizer "
                "with begin_num_update=iteration // n, lr_scheduler=lambda t: float(schedule(n * t - 1))"
            )
        raise ValueError(f"gradient_accumulation_steps={batches}: {need}")
    if iteration % batches != 0:
        raise ValueError(
            f"iteration={iteration}: must be a multiple of gradient_accumulation_steps={batches}: convert right after "
            "an update"
        )
    return iteration // batches


def _accumulates(names: set[str]) -> bool:
    """Whether gradients are accumulated over several batches."""
    return any(_belongs(name, "_gradient_accumulator", names) for name in names)


def _belongs(name: str, ending: str, names: set[str]) -> bool:
    """Whether a variable with this name ending belongs to an accumulator."""
    return name.endswith(ending) and f"{name.removesuffix(ending)}_accumulator" in names


def to_keras(states: Mapping[Index, Any], optimizer: AdaGrad, variables: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Return what to assign to the variables of an optimizer of Keras; inverse of :func:`from_keras`.

    Parameters
    ----------
    states : mapping of index to state
    optimizer : AdaGrad
        The optimizer of the states. If it has a scheduler and Keras a rate that is not a schedule, as one that a
        callback assigns, the two need only be equal at the next update.
    variables : iterable
        ``keras_optimizer.variables``, once it has been built for the weights of the states, in the same order.

    Returns
    -------
    list of (variable, value)
        For ``variable.assign(value)``: the accumulators, and the iteration, from which a schedule continues.

    Raises
    ------
    ValueError
        If the optimizer has epsilon or weight decay in a different place from Keras, or another learning rate than the
        variables; if Keras has a schedule and the optimizer has none; if there are row-wise histories or master copies,
        which Keras does not have; if the accumulators are not as many as the states, or of other shapes; if Keras
        accumulates gradients: then its iteration counts batches.
    """
    histories = to_arrays(states, optimizer, "keras")
    named = _named(variables)
    names = {name for name, _ in named}
    accumulators = [each for name, each in named if name.endswith("accumulator")]
    if len(accumulators) > len(histories) and _accumulates(names):
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
    if "iteration" in names and "learning_rate" not in names:
        require_schedule(f"iteration={updates}", updates, "Keras", optimizer, ())
    iteration = [(each, updates) for name, each in named if name in ("iteration", "iteration:0")]
    return [*zip(accumulators, histories, strict=True), *iteration]


def _named(variables: Any) -> list[tuple[str, Any]]:
    """The variables with their names in Keras 3; an array is taken for an accumulator."""
    try:
        named = [(getattr(each, "name", None) or "accumulator", each) for each in variables]
    except TypeError:
        raise TypeError(f"variables={checks.describe(variables)}: must be optimizer.variables") from None
    return [(_OF_KERAS_2.sub(r"\2_\1", name), each) for name, each in named]
