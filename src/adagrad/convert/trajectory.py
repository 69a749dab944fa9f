"""Checks that the next steps are the same on both sides of a conversion."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

from adagrad import checks, dialects
from adagrad.adagrad import AdaGrad
from adagrad.rates import Index


def require_adagrad(optimizer: Any) -> None:
    if not isinstance(optimizer, AdaGrad):
        raise TypeError(f"optimizer={checks.describe(optimizer)}: must be an adagrad.AdaGrad or GroupAdaGrad")


def require_rule(optimizer: AdaGrad, dialect: str) -> None:
    """Check that the optimizer has epsilon, and weight decay if any, in the same place as the dialect."""
    require_adagrad(optimizer)
    preset = dialects.find(dialect)
    if optimizer.epsilon_inside != preset.epsilon_inside and optimizer.epsilon != 0:
        divisor = "sqrt(history + epsilon)" if preset.epsilon_inside else "sqrt(history) + epsilon"
        raise ValueError(
            f"epsilon_inside={optimizer.epsilon_inside}: must be {preset.epsilon_inside}: {preset.framework} divides "
            f"by {divisor}; make the optimizer with dialect={dialect!r}"
        )
    either = dialect in ("optax", "fbgemm")  # there it is the user's choice
    if optimizer.wd != 0 and optimizer.decoupled_decay != preset.decoupled_decay and not either:
        place = "outside the gradient" if preset.decoupled_decay else "in the gradient, and so in the history"
        raise ValueError(
            f"decoupled_decay={optimizer.decoupled_decay}: must be {preset.decoupled_decay}, since wd={optimizer.wd}: "
            f"{preset.framework} has weight decay {place}; make the optimizer with dialect={dialect!r}"
        )


def require_rate(what: str, lr: float, lr_decay: float, step: int, optimizer: AdaGrad, index: Index) -> None:
    """Check that the optimizer's learning rate at the next update, after ``step``, is the other side's.

    That is ``lr / (1 + step * lr_decay)``; a decay or schedule must continue here.
    """
    if lr_decay != 0 and optimizer.lr_scheduler is None:
        raise ValueError(
            f"lr_decay={lr_decay!r} of {what}: its learning rate continues to decay, after {step} steps so far: pass "
            f"learning_rate=None, begin_num_update={step}, lr_scheduler=lambda t: {lr!r} / (1 + (t - 1) * {lr_decay!r})"
        )
    if optimizer.lr_scheduler is not None and count(optimizer, index) != step:
        raise ValueError(
            f"step={step} of {what}: must be the optimizer's count of updates, which is {count(optimizer, index)}, "
            f"because its lr_scheduler continues from there: pass begin_num_update={step}"
        )
    theirs, ours = lr / (1 + step * lr_decay), next_lr(optimizer, index, step)
    if not math.isclose(theirs, ours, rel_tol=1e-7):
        raise ValueError(f"lr={theirs!r} of {what}: must be the optimizer's at its next update, which is {ours!r}")


def require_schedule(
    what: str, step: int, framework: str, optimizer: AdaGrad, indices: Iterable[Index], batches: int = 1
) -> None:
    """Check that the optimizer has a schedule and continues it after ``step`` updates.

    Parameters
    ----------
    batches : int, default 1
        How often the framework counts for each update.
    """
    if optimizer.lr_scheduler is None or any(count(optimizer, index) != step for index in indices):
        times = f"{batches} * " if batches > 1 else ""
        raise ValueError(
            f"{what}: {framework} continues its schedule from there, and so must the optimizer: pass "
            f"learning_rate=None, begin_num_update={step}, lr_scheduler=lambda t: float(schedule({times}t - 1)), "
            f"since {framework} counts {'batches, ' if times else ''}from 0"
        )


def count(optimizer: AdaGrad, index: Index) -> int:
    """Return how often the weight ``index`` was updated."""
    return optimizer._index_update_count.get(index, optimizer.begin_num_update)


def next_lr(optimizer: AdaGrad, index: Index, step: int) -> float:
    """Return the learning rate of the weight ``index`` at the update after ``step``."""
    if optimizer._overrides_rates():
        return optimizer._resolve([index])[0][0]
    base = float(optimizer._lr_at(max(step + 1, optimizer.num_update)))
    return base * optimizer._multiplier(index, "lr_mult", optimizer.lr_mult)


def ordered(states: Mapping[Index, Any]) -> dict[Index, Any]:
    """Return ``states`` sorted by index if all indices are integers, else in their order."""
    if not isinstance(states, Mapping):
        raise TypeError(f"states={checks.describe(states)}: must be a dict of index to state")
    if all(isinstance(index, numbers.Integral) for index in states):
        return {index: states[index] for index in sorted(states)}
    return dict(states)
