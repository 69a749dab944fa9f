"""Read the state files of MXNet 2.0 and 1.x (``Trainer.save_states``, ``Updater.get_states``), without MXNet.

The file is a pickle, which :mod:`adagrad.mxnet_pickle` reads without executing it.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, TypeVar

from adagrad import checks
from adagrad.checkpoint import State
from adagrad.mxnet_pickle import OPTIMIZERS, SCHEDULERS, Array, Machine, Record, is_unknown, kind, refusal

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class MXNetOptimizer:
    """An optimizer as saved by MXNet. There is no ``param_dict``: MXNet leaves it out of the file.

    ``lr`` is the constructor's argument; with a ``scheduler``, only that scheduler's ``base_lr`` matters.
    ``scheduler`` is the class name and the constructor arguments with which MXNet's schedule is recreated, with the
    original ``base_lr`` rather than the decayed one in the file. ``warmup_final_lr``, not a constructor argument, is
    added if the warm-up does not end at ``base_lr``, as after ``learning_rate`` overwrote that: construct the schedule
    with it as ``base_lr``, then set its ``base_lr``, which may be below ``warmup_begin_lr``. A user-defined scheduler
    is "custom": nothing is known about it. So is one that something else has changed.
    """

    name: str
    rescale_grad: float
    lr: float | None
    wd: float
    clip_gradient: float | None
    epsilon: float
    begin_num_update: int
    num_update: int
    index_update_count: dict[int | str, int]
    lr_mult: dict[int | str, float]
    wd_mult: dict[int | str, float]
    idx2name: dict[int | str, str]
    multi_precision: bool
    scheduler: tuple[str, dict[str, Any]] | str | None
    epsilon_inside: bool = False
    decoupled_decay: bool = False

    def config(self) -> dict[str, Any]:
        """Return this in the form that ``Optimizer.set_config`` takes; the initial history is 0, as always in MXNet.

        ValueError for ``clip_gradient=0``, with which training cannot continue.
        """
        if self.clip_gradient == 0:
            raise ValueError(
                "clip_gradient=0: must be None or > 0: with 0, MXNet sets dense gradients to zero and does not clip "
                "row-sparse ones; to continue without clipping, load a file that was saved without the optimizer"
            )
        plain = {name: value for name, value in vars(self).items() if name not in ("name", "scheduler")}
        return {"class": self.name, "lr_scheduler": self.scheduler, "initial_accumulator_value": 0.0} | plain


def is_mxnet_states(data: bytes) -> bool:
    """Whether ``data`` starts like a pickle, and is not a safetensors file that happens to start so."""
    start = bytes(data[:9])
    if start[:1] in (b"(", b"}", b"]") and data[-1:] == b"." and start[8:] != b"{":
        return True  # a pickle of protocol 0 or 1, which is refused
    return len(start) > 1 and start[0] == 0x80 and 2 <= start[1] <= 5 and start[5:9] != b"\0\0\0{"


def decode(data: bytes) -> tuple[dict[int | str, State], MXNetOptimizer | None]:
    """Return the states in ``data``, and the optimizer if the file contains one.

    Arrays are new, writable and in C order, of the dtype in the file; bfloat16 is widened to float32. ValueError, with
    the reason, if the file is truncated, altered, something else, or contains what such a file does not need.
    """
    try:
        found = Machine(memoryview(data).cast("B")).run()
        optimizer = None
        if isinstance(found, tuple) and len(found) == 2:
            found, record = found
            if is_unknown(record):
                raise refusal(kind(record))
            if not isinstance(record, Record) or record.name not in OPTIMIZERS.values():
                raise ValueError("what follows the states is not an optimizer")
            optimizer = _optimizer(_Attributes(record))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {kind(found)}, not a dict of states")
        seen: set[int] = set()
        return {key: _state(value, seen) for key, value in found.items()}, optimizer
    except ValueError as error:
        raise ValueError(f"not an MXNet state file that can be read: {error}") from error


# -------------------------------------------------------------------------------------------------- what the file holds


def _state(value: Any, seen: set[int], depth: int = 0) -> State:
    """Return the state in ``value``; its arrays and containers must not be shared: MXNet shares none."""
    if value is None:
        return None
    if not isinstance(value, (Array, tuple, list)) or depth > 8:
        raise ValueError(f"a state that is neither an array nor a tuple of them: {kind(value)}")
    if id(value) in seen:
        raise ValueError("two states share an array")
    if value != ():  # () is a singleton
        seen.add(id(value))
    if isinstance(value, Array):
        if value.data is None:
            raise ValueError("an array has no value")
        return value.data
    parts = [_state(part, seen, depth + 1) for part in value]
    return tuple(parts) if isinstance(value, tuple) else parts


class _Attributes:
    """The attributes of an optimizer or scheduler, each checked when it is read; others are ignored."""

    def __init__(self, record: Record) -> None:
        self.name = record.name
        self.values = record.attributes or {}

    def get(self, key: str, *types: type) -> Any:
        if key not in self.values:
            raise ValueError(f"{self.name} has no {key}")
        return self.checked(key, self.values[key], *types)

    def checked(self, key: str, value: Any, *types: type) -> Any:
        if type(value) not in types:
            raise ValueError(f"{self.name}.{key} is of type {kind(value)}")
        if type(value) is float and not math.isfinite(value):
            raise ValueError(f"{self.name}.{key}={value}: must be finite")
        return value

    def real(self, key: str) -> float:
        return float(self.get(key, float, int))

    def real_or_none(self, key: str) -> float | None:
        value = self.get(key, float, int, type(None))
        return None if value is None else float(value)

    def count(self, key: str) -> int:
        value: int = self.get(key, int)
        return self.not_negative(key, value)

    def step(self, key: str) -> float:
        value: float = self.get(key, int, float)
        return self.not_negative(key, value)

    def steps(self, key: str) -> list[float]:
        return [self.not_negative(key, self.checked(key, value, int, float)) for value in self.get(key, list)]

    def table(self, key: str, *types: type) -> dict[int | str, Any]:
        return {index: self.checked(key, value, *types) for index, value in self.get(key, dict).items()}

    def not_negative(self, key: str, value: _Number) -> _Number:
        if value < 0:
            raise ValueError(f"{self.name}.{key}={value}: must be >= 0")
        return value


def _optimizer(found: _Attributes) -> MXNetOptimizer:
    num_update, lr = found.count("num_update"), found.real_or_none("lr")
    schedule = found.values.get("lr_scheduler")
    if not is_unknown(schedule):
        schedule = found.get("lr_scheduler", Record, type(None))
    if lr is None and schedule is None:
        raise ValueError(f"{found.name} has neither lr nor lr_scheduler")
    first = "float_stable_eps" in found.values  # MXNet 1, which has another rule
    return MXNetOptimizer(
        name=found.name,
        rescale_grad=found.real("rescale_grad"),
        lr=lr,
        wd=found.real("wd"),
        clip_gradient=found.real_or_none("clip_gradient"),
        epsilon=found.real("float_stable_eps" if first else "epsilon"),
        begin_num_update=found.count("begin_num_update"),
        num_update=num_update,
        index_update_count={
            key: found.not_negative(f"_index_update_count[{key!r}]", value)
            for key, value in found.table("_index_update_count", int).items()
        },
        lr_mult={key: float(value) for key, value in found.table("lr_mult", float, int).items()},
        wd_mult={key: float(value) for key, value in found.table("wd_mult", float, int).items()},
        idx2name=found.table("idx2name", str),
        multi_precision=bool(found.get("multi_precision", bool, int)),
        scheduler=_scheduler(schedule, lr, num_update),
        epsilon_inside=first,
        decoupled_decay=first,
    )


def _scheduler(schedule: Any, lr: float | None, num_update: int) -> tuple[str, dict[str, Any]] | str | None:
    """Return the schedule from its start; "custom", with a UserWarning, if it is not where it should be.

    MXNet's decays in place: something else may have changed it, or called it for later updates.
    """
    if schedule is None or is_unknown(schedule):
        return None if schedule is None else "custom"
    found = _Attributes(schedule)
    if found.name not in SCHEDULERS.values():
        raise ValueError(f"{found.name} cannot be a scheduler")
    now, warm = found.real("base_lr"), found.real("warmup_final_lr")
    arguments: dict[str, Any] = {
        "warmup_steps": found.count("warmup_steps"),
        "warmup_begin_lr": found.real("warmup_begin_lr"),
        "warmup_mode": found.get("warmup_mode", str),
    }
    if found.name in ("PolyScheduler", "CosineScheduler"):
        starts, got_to = [found.real("base_lr_orig")], 0.0  # these two start from it even if lr was given
        arguments |= {"max_update": found.count("max_update"), "final_lr": found.real("final_lr")}
        if found.name == "PolyScheduler":
            arguments["pwr"] = found.real("power")
        ends = num_update > arguments["max_update"] and arguments.get("pwr") != 0
        expected = [arguments["final_lr"] if ends else now]
    else:
        # lr overwrote the base_lr of a scheduler passed with it; one that was set later starts from its own.
        starts = [warm] if lr is None else [lr, warm]
        factor, got_to = found.real("factor"), found.step("count")
        if found.name == "FactorScheduler":
            step = found.step("step")
            stop = found.real("stop_factor_lr")
            arguments |= {"step": step, "stop_factor_lr": stop}
            decays = round(got_to / max(step, 1))
        else:
            arguments["step"] = found.steps("step")
            stop, decays = -math.inf, found.count("cur_step_ind")
        arguments["factor"] = factor
        if abs(factor) > 1:
            raise ValueError(f"{found.name}.factor={factor}: must be <= 1")
        expected = [max(base * factor**decays, stop) if decays else base for base in starts]
    agreeing = [base for base, value in zip(starts, expected, strict=True) if math.isclose(now, value, rel_tol=1e-6)]
    is_ahead = got_to >= num_update > 0
    if is_ahead or not agreeing:
        ahead = f" and has got to {got_to}" if is_ahead else ""
        warnings.warn(
            f"{found.name}.base_lr={now}: its schedule gives {expected[0]} at num_update {num_update}{ahead}: "
            "something else has changed it; it is not read, as if it were user-defined",
            UserWarning,
            stacklevel=checks.caller(),
        )
        return "custom"
    arguments["base_lr"] = base = agreeing[0]
    if warm != base and (arguments["warmup_steps"] or arguments["warmup_begin_lr"] > base):
        arguments["warmup_final_lr"] = warm
    return found.name, arguments
