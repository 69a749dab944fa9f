"""Learning-rate schedules: pure functions of the number of updates.

Names, arguments and values are those of ``mxnet.lr_scheduler`` (2.0). MXNet's schedules change when called; these do
not, so a schedule can be shared, called out of order and saved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from adagrad import checks

__all__ = ["CosineScheduler", "FactorScheduler", "LRScheduler", "MultiFactorScheduler", "PolyScheduler"]


class LRScheduler:
    """Abstract base class: a warm-up, then :meth:`after_warmup`, which the subclass defines.

    A subclass may also override ``__call__`` alone, as in MXNet.

    Parameters
    ----------
    base_lr : float, default 0.01
        The initial learning rate, reached at the end of the warm-up.
    warmup_steps : int, default 0
        Number of updates in the warm-up.
    warmup_begin_lr : float, default 0
        The learning rate at the start of the warm-up, at most ``base_lr``.
    warmup_mode : {'linear', 'constant'}, default 'linear'
        Whether the warm-up rises linearly to ``base_lr`` or stays at ``warmup_begin_lr``.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or is negative, or ``warmup_begin_lr`` is above ``base_lr``.
    """

    def __init__(
        self,
        base_lr: float = 0.01,
        warmup_steps: int = 0,
        warmup_begin_lr: float = 0.0,
        warmup_mode: str = "linear",
    ) -> None:
        self.base_lr = checks.non_negative("base_lr", base_lr)
        self.warmup_steps = checks.integer("warmup_steps", warmup_steps, 0)
        self.warmup_begin_lr = checks.non_negative("warmup_begin_lr", warmup_begin_lr)
        if self.warmup_begin_lr > self.base_lr:
            raise ValueError(f"warmup_begin_lr={warmup_begin_lr!r}: must be <= base_lr={base_lr!r}")
        if warmup_mode not in ("linear", "constant"):
            raise ValueError(f"warmup_mode={warmup_mode!r}: must be 'linear' or 'constant'")
        self.warmup_mode = warmup_mode
        self._warmup_final_lr: float | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        # Schedules are computed in double, whatever scalar of NumPy a number came in.
        is_scalar = isinstance(value, np.floating) or (isinstance(value, np.ndarray) and value.ndim == 0)
        super().__setattr__(name, float(value) if is_scalar else value)

    def __call__(self, num_update: int) -> float:
        """Return the learning rate at update ``num_update``, the largest number of updates of any weight.

        TypeError or ValueError unless that is a number, finite and >= 0.
        """
        if type(num_update) is not int or not 0 <= num_update < 2**63:
            checks.non_negative("num_update", num_update)
        if num_update < self.warmup_steps:
            return self.get_warmup_lr(num_update)
        return self.after_warmup(num_update)

    def get_warmup_lr(self, num_update: int) -> float:
        """Return the learning rate within the warm-up."""
        if self.warmup_mode == "constant":
            return self.warmup_begin_lr
        rise = (self.warmup_final_lr - self.warmup_begin_lr) * num_update / self.warmup_steps
        return self.warmup_begin_lr + rise

    @property
    def warmup_final_lr(self) -> float:
        """Learning rate at the end of the warm-up: ``base_lr`` unless set separately, as in some MXNet state files."""
        return self.base_lr if self._warmup_final_lr is None else self._warmup_final_lr

    @warmup_final_lr.setter
    def warmup_final_lr(self, value: float) -> None:
        self._warmup_final_lr = checks.non_negative("warmup_final_lr", value)

    def after_warmup(self, num_update: int) -> float:
        """Return the learning rate at update ``num_update >= warmup_steps``."""
        raise NotImplementedError(f"{type(self).__name__} must define after_warmup or __call__")

    def __repr__(self) -> str:
        if not is_ours(self):  # a subclass may define config and attributes as it likes
            return object.__repr__(self)
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.config().items())})"

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments of this schedule, and ``warmup_final_lr`` if it was set separately."""
        names = ["base_lr", "warmup_steps", "warmup_begin_lr", "warmup_mode"]
        if self._warmup_final_lr is not None:
            names.append("warmup_final_lr")
        return {name: getattr(self, name) for name in names}


class FactorScheduler(LRScheduler):
    """Multiply by ``factor`` once every ``step`` updates: after update ``step``, ``2 * step``, ...

    Parameters
    ----------
    step : int or float
        Number of updates between two multiplications, >= 1. As in MXNet, it may be fractional.
    factor : float, default 1
        In (0, 1].
    stop_factor_lr : float, default 1e-8
        Decays stop here; a ``base_lr`` below it is raised to it at the first decay.
    base_lr, warmup_steps, warmup_begin_lr, warmup_mode
        See :class:`LRScheduler`.

    Raises
    ------
    TypeError, ValueError
        As there, and if ``step`` or ``factor`` is out of range.
    """

    def __init__(
        self,
        step: float,
        factor: float = 1.0,
        stop_factor_lr: float = 1e-8,
        base_lr: float = 0.01,
        warmup_steps: int = 0,
        warmup_begin_lr: float = 0.0,
        warmup_mode: str = "linear",
    ) -> None:
        super().__init__(base_lr, warmup_steps, warmup_begin_lr, warmup_mode)
        self.step = checks.at_least_one("step", step)
        self.factor = _factor(factor)
        self.stop_factor_lr = checks.non_negative("stop_factor_lr", stop_factor_lr)

    _last: tuple[Any, float, float] = (None, 0, 0.0)

    def after_warmup(self, num_update: int) -> float:
        # Repeated multiplication, not a power, to round as MXNet does; it continues from the last result if possible.
        given = self.step, self.base_lr, self.factor, self.stop_factor_lr
        before, count, lr = self._last
        if before != given or num_update <= count:
            count, lr = 0, self.base_lr
        if num_update > count + _BLOCK * self.step and has_blocks(self.step):
            count, lr = self._by_blocks(num_update, count, lr)
        while num_update > count + self.step:
            lower = max(lr * self.factor, self.stop_factor_lr)
            if lower == lr:
                count = int(num_update) - self.step  # it stays at this rate: later calls need not come this way again
                break
            count, lr = count + self.step, lower
        self._last = given, count, lr
        return lr

    def _by_blocks(self, num_update: int, count: float, lr: float) -> tuple[float, float]:
        """Continue from ``lr`` at ``count`` by whole blocks of multiplications, if the decay does not stop in one."""
        factors = np.full(_BLOCK + 1, self.factor)
        while num_update > count + _BLOCK * self.step:
            factors[0] = lr
            with np.errstate(under="ignore"):
                products = np.multiply.accumulate(factors)  # one after the other
            if products[-1] <= self.stop_factor_lr or products[-1] == products[-2]:
                break
            count, lr = count + _BLOCK * self.step, float(products[-1])
        return count, lr

    def config(self) -> dict[str, Any]:
        own = {"step": self.step, "factor": self.factor, "stop_factor_lr": self.stop_factor_lr}
        return own | super().config()


class MultiFactorScheduler(LRScheduler):
    """Multiply by ``factor`` after each of the updates listed in ``step``.

    Parameters
    ----------
    step : sequence of int or float
        Strictly increasing, each >= 1.
    factor : float, default 1
        In (0, 1].
    base_lr, warmup_steps, warmup_begin_lr, warmup_mode
        See :class:`LRScheduler`.

    Raises
    ------
    TypeError, ValueError
        As there, and if the steps do not increase or ``factor`` is out of range.
    """

    def __init__(
        self,
        step: Sequence[float],
        factor: float = 1.0,
        base_lr: float = 0.01,
        warmup_steps: int = 0,
        warmup_begin_lr: float = 0.0,
        warmup_mode: str = "linear",
    ) -> None:
        super().__init__(base_lr, warmup_steps, warmup_begin_lr, warmup_mode)
        if isinstance(step, (str, bytes)) or not isinstance(step, Sequence):
            raise TypeError(f"step={checks.describe(step)}: must be a list of numbers, not {type(step).__name__}")
        self.step = [checks.at_least_one(f"step[{i}]", each) for i, each in enumerate(step)]
        if not self.step or any(b <= a for a, b in zip(self.step, self.step[1:], strict=False)):
            raise ValueError(f"step={checks.describe(step)}: must be a non-empty, strictly increasing list")
        self.factor = _factor(factor)

    def after_warmup(self, num_update: int) -> float:
        lr = self.base_lr
        for each in self.step:
            if num_update <= each:
                break
            lr *= self.factor
        return lr

    def config(self) -> dict[str, Any]:
        return {"step": self.step, "factor": self.factor} | super().config()


class _ToFinal(LRScheduler):
    """Base class for decay from ``base_lr`` to ``final_lr`` at ``max_update``, constant from then on."""

    def __init__(
        self,
        max_update: int,
        base_lr: float = 0.01,
        final_lr: float = 0.0,
        warmup_steps: int = 0,
        warmup_begin_lr: float = 0.0,
        warmup_mode: str = "linear",
    ) -> None:
        super().__init__(base_lr, warmup_steps, warmup_begin_lr, warmup_mode)
        self.max_update = checks.integer("max_update", max_update, 1)
        if self.warmup_steps >= self.max_update:
            raise ValueError(f"warmup_steps={warmup_steps!r}: must be < max_update={max_update!r}")
        self.final_lr = checks.non_negative("final_lr", final_lr)

    def after_warmup(self, num_update: int) -> float:
        num_update = min(num_update, self.max_update)
        remaining = self.remaining(num_update - self.warmup_steps, self.max_update - self.warmup_steps)
        return self.final_lr + (self.base_lr - self.final_lr) * remaining

    def remaining(self, done: int, steps: int) -> float:
        """Return the remaining part of the decay after ``done`` of ``steps`` updates, rounded as in MXNet."""
        raise NotImplementedError(f"{type(self).__name__} must define remaining")

    def config(self) -> dict[str, Any]:
        return {"max_update": self.max_update, "final_lr": self.final_lr} | super().config()


class PolyScheduler(_ToFinal):
    """``final_lr + (base_lr - final_lr) * (1 - progress) ** pwr``; ``final_lr`` from ``max_update`` on, if ``pwr > 0``.

    Parameters
    ----------
    max_update : int
        The update at which ``final_lr`` is reached; progress is measured from the end of the warm-up to here.
    base_lr : float, default 0.01
    pwr : float, default 2
    final_lr : float, default 0
    warmup_steps, warmup_begin_lr, warmup_mode
        See :class:`LRScheduler`.

    Raises
    ------
    TypeError, ValueError
        As there, and if ``warmup_steps`` is not below ``max_update``.
    """

    def __init__(
        self,
        max_update: int,
        base_lr: float = 0.01,
        pwr: float = 2,
        final_lr: float = 0.0,
        warmup_steps: int = 0,
        warmup_begin_lr: float = 0.0,
        warmup_mode: str = "linear",
    ) -> None:
        super().__init__(max_update, base_lr, final_lr, warmup_steps, warmup_begin_lr, warmup_mode)
        self.pwr = checks.non_negative("pwr", pwr)

    def remaining(self, done: int, steps: int) -> float:
        return math.pow(1.0 - done / steps, self.pwr)

    def config(self) -> dict[str, Any]:
        return super().config() | {"pwr": self.pwr}


class CosineScheduler(_ToFinal):
    """``final_lr + (base_lr - final_lr) * (1 + cos(pi * progress)) / 2``; ``final_lr`` from ``max_update`` on.

    Parameters
    ----------
    max_update : int
        The update at which ``final_lr`` is reached; progress is measured from the end of the warm-up to here.
    base_lr : float, default 0.01
    final_lr : float, default 0
    warmup_steps, warmup_begin_lr, warmup_mode
        See :class:`LRScheduler`.

    Raises
    ------
    TypeError, ValueError
        As there, and if ``warmup_steps`` is not below ``max_update``.
    """

    def remaining(self, done: int, steps: int) -> float:
        return (1 + math.cos(math.pi * done / steps)) / 2


def is_ours(scheduler: Any) -> bool:
    """Whether the class of ``scheduler`` is this library's, not user-defined."""
    return type(scheduler).__module__ == __name__


def _factor(factor: Any) -> float:
    value = checks.non_negative("factor", factor)
    if not 0 < value <= 1:
        raise ValueError(f"factor={factor!r}: must be in (0, 1]")
    return value


_BLOCK = 1000
"""Multiplications of a FactorScheduler that are done at once, where it has many to do."""


def has_blocks(step: float) -> bool:
    """Whether the multiples of ``step`` are exact, so that it can be taken many times at once."""
    return step == int(step)
