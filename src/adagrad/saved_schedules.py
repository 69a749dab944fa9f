"""Schedules in checkpoints: which can be saved, and how they are made again."""

from __future__ import annotations

import math
from typing import Any

from adagrad import checks
from adagrad.lr_scheduler import (
    CosineScheduler,
    FactorScheduler,
    LRScheduler,
    MultiFactorScheduler,
    PolyScheduler,
    has_blocks,
)

MOST_DECAYS = 10**8
"""Most multiplications that a saved schedule may need to reach its position, a tenth without blocks: a few seconds."""


def require_reachable(schedule: Any, num_update: int) -> None:
    """ValueError for a schedule that needs more than MOST_DECAYS multiplications to get to ``num_update``."""
    if not isinstance(schedule, FactorScheduler) or schedule.factor == 1 or schedule.base_lr == 0:
        return
    stop = max(schedule.stop_factor_lr, math.ulp(0.0))  # it stops there, or where the numbers end
    decays = min(num_update / schedule.step, (math.log(stop) - math.log(schedule.base_lr)) / math.log(schedule.factor))
    most = MOST_DECAYS if has_blocks(schedule.step) else MOST_DECAYS // 10
    if decays > most:
        raise ValueError(f"num_update={num_update}: must be <= {most} steps of its FactorScheduler")


def from_config(name: Any, config: Any) -> LRScheduler:
    """Return the schedule with this class name and :meth:`LRScheduler.config`; ValueError if they are invalid."""
    classes = {c.__name__: c for c in (FactorScheduler, MultiFactorScheduler, PolyScheduler, CosineScheduler)}
    if name not in classes or not isinstance(config, dict):
        raise ValueError(f"lr_scheduler={name!r}: must be one of {', '.join(classes)}")
    arguments = dict(config)
    # base_lr may be below warmup_begin_lr if it was set later, so it is set later here, too.
    final = arguments.pop("warmup_final_lr", None)
    try:
        base, begin = (checks.non_negative(each, arguments.get(each)) for each in ("base_lr", "warmup_begin_lr"))
        schedule = classes[name](**(arguments | {"base_lr": max(base, begin)}))
        if final is not None:
            schedule.warmup_final_lr = final
        schedule.base_lr = base
    except TypeError as error:
        raise ValueError(f"lr_scheduler {name}: {error}") from error
    return schedule
