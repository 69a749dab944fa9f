"""The options of a parameter group of :class:`adagrad.torch.Adagrad`: names, checks, and the rule that they give."""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

from torch import Tensor

from adagrad import checks
from adagrad.rule import Rule

RULE = ("epsilon_inside", "decoupled_decay")
"""Options of the rule that torch.optim.Adagrad lacks; for its checkpoints they are False."""


def check_options(options: dict[str, Any], *, are_loaded: bool = False) -> None:
    """Check the options of a group; messages begin like those of torch.optim.Adagrad.

    When they ``are_loaded``, what a step accepts is accepted: a learning rate or weight decay that a schedule has
    brought just below zero, and any combination of ``foreach`` and ``fused``.
    """
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element: lr has shape {tuple(lr.shape)}")
    for name, label in (
        ("lr", "learning rate"),
        ("lr_decay", "lr_decay value"),
        ("weight_decay", "weight_decay value"),
        ("initial_accumulator_value", "initial_accumulator_value value"),
        ("eps", "epsilon value"),
    ):
        value = checks.real(name, number(name, options[name]))
        if not 0 <= (abs(value) if are_loaded and name in ("lr", "weight_decay") else value) < math.inf:
            raise ValueError(f"Invalid {label}: {options[name]}: {name} must be finite and >= 0")
    checks.positive_or_none("clip_value", options["clip_value"])
    for name in ("maximize", "differentiable", "row_wise", "multi_precision", *RULE):
        checks.boolean(name, options[name])
    if options["fused"] and not are_loaded:
        if options["differentiable"]:
            raise RuntimeError("`fused` does not support `differentiable`")
        if options["foreach"]:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def number(name: str, value: Any) -> Any:
    """Return a hyper-parameter, which may be a tensor of one real number, as a number."""
    return float(one_real(name, value.detach())) if isinstance(value, Tensor) else value


def one_real(name: str, value: Tensor) -> Tensor:
    """Return a view of a tensor without dimensions; ValueError unless it has one real number."""
    if value.numel() != 1 or value.is_complex():
        raise ValueError(f"{name}: {value.dtype} of shape {tuple(value.shape)}: must be one real number")
    return value.reshape(())


# --------------------------------------------------------------------------------------------------------- of each step

_options_of = operator.itemgetter(  # in the order of the parameters of _rule_and_decays
    "maximize", "clip_value", "eps", "epsilon_inside", "decoupled_decay", "row_wise", "weight_decay", "lr_decay"
)
_USUAL = frozenset((bool, int, float, type(None)))
"""Immutable types of options: those of other types, such as tensors, may change between steps."""


@functools.lru_cache(maxsize=64, typed=True)
def _rule_and_decays(maximize: bool, clip_value: Any, eps: Any, inside: bool, decoupled: bool, row_wise: bool,
                     weight_decay: Any, lr_decay: Any) -> tuple[Rule, float, float]:  # fmt: skip
    """See :func:`rule_and_decays`."""
    for name, value in (("maximize", maximize), ("epsilon_inside", inside), ("decoupled_decay", decoupled),
                        ("row_wise", row_wise)):  # fmt: skip
        checks.boolean(name, value)
    eps, weight_decay, lr_decay = number("eps", eps), number("weight_decay", weight_decay), number("lr_decay", lr_decay)
    rule = Rule(
        rescale_grad=-1.0 if maximize else 1.0,
        clip_gradient=checks.positive_or_none("clip_value", clip_value),
        epsilon=checks.non_negative("eps", eps),
        epsilon_inside=inside,
        decoupled_decay=decoupled,
        row_wise=row_wise,
    )
    # As for lr, a schedule may fall below zero by a rounding error.
    return rule, checks.finite("weight_decay", weight_decay), checks.non_negative("lr_decay", lr_decay)


_last: tuple[tuple[Any, ...], Any] = (tuple(object() for _ in range(8)), None)
"""The last options looked up, if all are of usual types, and the result."""


def rule_and_decays(group: dict[str, Any]) -> tuple[Rule, float, float]:
    """Return the rule of a group, its weight decay and its learning-rate decay; checked at every step.

    Fast if the options are the same objects as in the last call, the usual case.
    """
    global _last
    options = _options_of(group)
    given, found = _last
    if all(map(operator.is_, options, given)):
        answer: tuple[Rule, float, float] = found
        return answer
    if not _USUAL.issuperset(map(type, options)):
        return _rule_and_decays.__wrapped__(*options)
    answer = _rule_and_decays(*options)
    _last = options, answer
    return answer
