"""Schedules in an updater's checkpoints: which are saved, which are kept, and how far on one may be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from adagrad import AdaGrad, checkpoint, get_updater
from adagrad.lr_scheduler import CosineScheduler, FactorScheduler, PolyScheduler
from adagrad.saved_schedules import MOST_DECAYS

# ------------------------------------------------------------------------------------------------------- saved and kept


def test_a_schedule_of_ones_own_is_kept_and_never_saved() -> None:
    def schedule(n: int) -> float:
        return 1.0 / n

    updater = get_updater(AdaGrad(None, lr_scheduler=schedule))
    updater(0, np.ones(2), np.ones(2))
    data = updater.get_states(dump_optimizer=True)
    other = get_updater(AdaGrad(None, lr_scheduler=lambda n: 2.0 / n))
    kept = other.optimizer.lr_scheduler
    other.set_states(data)
    assert other.optimizer.lr_scheduler is kept
    assert other.optimizer.learning_rate == 2.0
    without = get_updater(AdaGrad(0.5))
    with pytest.warns(UserWarning, match=r"custom scheduler, which .* not contain: keeping learning_rate=0\.5"):
        without.set_states(data)
    assert without.optimizer.lr_scheduler is None
    assert without.optimizer.learning_rate == 0.5
    for saved in (AdaGrad(None, lr_scheduler=FactorScheduler(1, 0.5)), AdaGrad(0.3)):
        other.set_states(get_updater(saved).get_states(dump_optimizer=True))
        assert other.optimizer.lr_scheduler is kept


def test_a_schedule_here_is_kept_when_the_saved_one_was_custom() -> None:
    saved = get_updater(AdaGrad(None, lr_scheduler=lambda t: 0.5))
    data = saved.get_states(dump_optimizer=True)
    here = get_updater(AdaGrad(None, lr_scheduler=PolyScheduler(10, 0.25)))
    here.set_states(data)  # without a warning
    assert here.optimizer.learning_rate == 0.25


@pytest.mark.parametrize("changed", ["base_lr", "warmup_final_lr"])
def test_a_schedule_whose_rate_was_lowered_below_its_warm_up_goes_on(changed: str) -> None:
    schedule = CosineScheduler(100, base_lr=0.1, warmup_steps=5, warmup_begin_lr=0.05)
    setattr(schedule, changed, 0.01)
    updater = get_updater(AdaGrad(None, lr_scheduler=schedule))
    again = get_updater(AdaGrad())
    again.set_states(updater.get_states(dump_optimizer=True))
    assert [again.optimizer._lr_at(n) for n in range(120)] == [schedule(n) for n in range(120)]


def test_a_schedule_that_could_not_be_loaded_is_not_saved() -> None:
    schedule = CosineScheduler(100, warmup_steps=5)
    schedule.max_update = 2
    updater = get_updater(AdaGrad(None, lr_scheduler=schedule))
    with pytest.raises(ValueError, match=r"optimizer AdaGrad: cannot be saved: warmup_steps=5: must be < max_update=2"):
        updater.get_states(dump_optimizer=True)
    updater.get_states()


def test_a_schedule_of_zeros_can_be_saved() -> None:
    optimizer = AdaGrad(None, lr_scheduler=FactorScheduler(1, 0.5, base_lr=0.0))
    assert optimizer.config()["lr_scheduler"][0] == "FactorScheduler"


# ----------------------------------------------------------------------------------------------------------- how far on


def test_a_schedule_far_on_is_saved_and_loaded() -> None:
    schedule = FactorScheduler(1, 0.9999999, base_lr=0.1)
    updater = get_updater(AdaGrad(None, lr_scheduler=schedule, begin_num_update=12_000_000))
    weight, again = np.ones(1), get_updater(AdaGrad())
    updater(0, np.ones(1), weight)
    again.set_states(updater.get_states(True))
    assert again.optimizer.learning_rate == updater.optimizer.learning_rate == pytest.approx(0.1 * math.exp(-1.2))


@pytest.mark.parametrize("where", ["num_update", "begin_num_update", "index_update_count"])
def test_a_schedule_that_would_take_forever_is_refused(where: str) -> None:
    """A file may ask for 10^12 multiplications at the first step."""
    schedule = FactorScheduler(1, 1 - 1e-13, stop_factor_lr=0.0, base_lr=1.0)
    far: Any = {0: 10**12} if where == "index_update_count" else 10**12
    config = AdaGrad(None, lr_scheduler=schedule).config() | {where: far}
    with pytest.raises(ValueError, match=r"must be <= 100000000 steps of its FactorScheduler"):
        get_updater(AdaGrad()).set_states(checkpoint.encode({}, config))
    optimizer = AdaGrad(None, lr_scheduler=schedule, begin_num_update=10**12)
    with pytest.raises(ValueError, match="cannot be saved: num_update"):
        optimizer.config()


def test_a_schedule_between_the_ends_of_the_numbers() -> None:
    schedule = FactorScheduler(1, 0.5, stop_factor_lr=1e-300, base_lr=1e300)
    updater = get_updater(AdaGrad(None, lr_scheduler=schedule))
    updater.set_states(updater.get_states(True))
    assert updater.optimizer.learning_rate == 1e300


def test_a_long_training_can_be_saved() -> None:
    for schedule in (FactorScheduler(1), FactorScheduler(1, 0.5), FactorScheduler(10, 0.999, base_lr=0.1)):
        updater = get_updater(AdaGrad(None, lr_scheduler=schedule, begin_num_update=10**8))
        updater(0, np.ones(1), np.ones(1))
        again = get_updater(AdaGrad())
        again.set_states(updater.get_states(dump_optimizer=True))
        assert again.optimizer.learning_rate == updater.optimizer.learning_rate


def test_how_far_a_saved_schedule_may_be() -> None:
    long_steps = FactorScheduler(1000, 1 - 1e-13, stop_factor_lr=0.0, base_lr=1.0)
    AdaGrad(None, lr_scheduler=long_steps, begin_num_update=10**10).config()  # 10^7 multiplications
    to_the_end = FactorScheduler(1, 1 - 1e-6, stop_factor_lr=0.0, base_lr=1.0)  # 7 * 10^8, until it is 0
    with pytest.raises(ValueError, match="cannot be saved: num_update"):
        AdaGrad(None, lr_scheduler=to_the_end, begin_num_update=10**9).config()


def test_a_schedule_that_ends_soon_can_be_saved_however_far_on() -> None:
    """Its few decays are counted from its own first rate."""
    schedule = FactorScheduler(1, 1 - 1e-9, stop_factor_lr=0.0099, base_lr=0.01)  # 10^7 multiplications
    AdaGrad(None, lr_scheduler=schedule, begin_num_update=10**12).config()


def test_the_last_schedule_that_can_be_saved() -> None:
    schedule = FactorScheduler(1, 1 - 1e-13, stop_factor_lr=0.0, base_lr=1.0)
    AdaGrad(None, lr_scheduler=schedule, begin_num_update=MOST_DECAYS - 1).config()
    with pytest.raises(ValueError, match="cannot be saved: num_update"):
        AdaGrad(None, lr_scheduler=schedule, begin_num_update=MOST_DECAYS).config()
