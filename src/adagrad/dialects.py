"""The AdaGrad of other frameworks, as presets of the options of :class:`~adagrad.AdaGrad`.

The rule is always that of :mod:`adagrad.rule`; a dialect sets the place of its constants, and a framework's defaults.
The facts are from the sources of the versions named, and were compared with their results; where a framework rounds in
another order, the results are equal up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from adagrad import checks


@dataclass(frozen=True, slots=True)
class Dialect:
    """A framework's variant of AdaGrad.

    Attributes
    ----------
    framework : str
        Its name and the version examined.
    learning_rate : float or None
        Its default; None if it has none or, like MXNet 1, prefers the scheduler's.
    epsilon, initial_accumulator_value : float
        Its defaults.
    epsilon_inside : bool
        Whether it divides by ``sqrt(history + epsilon)`` rather than by ``sqrt(history) + epsilon``.
    decoupled_decay : bool
        Whether weight decay is applied separately from the gradient, and so does not enter the history.
    row_wise_epsilon : float or None
        The default of its row-wise AdaGrad, if it differs.
    has_row_wise : bool
        Whether it has a row-wise AdaGrad.
    """

    framework: str
    learning_rate: float | None
    epsilon: float
    initial_accumulator_value: float
    epsilon_inside: bool = False
    decoupled_decay: bool = False
    row_wise_epsilon: float | None = None
    has_row_wise: bool = False

    def numbers(self, learning_rate: Any, epsilon: Any, initial_accumulator_value: Any, row_wise: bool) -> list[Any]:
        """Return the three arguments, with the dialect's defaults for those not passed."""
        own_epsilon = self.row_wise_epsilon if row_wise and self.row_wise_epsilon is not None else self.epsilon
        defaults = (self.learning_rate, own_epsilon, self.initial_accumulator_value)
        given = (learning_rate, epsilon, initial_accumulator_value)
        return [own if _is_default(value) else value for value, own in zip(given, defaults, strict=True)]

    def options(self, epsilon_inside: bool | None, decoupled_decay: bool | None) -> tuple[bool, bool]:
        """Return the two options of the rule, with the dialect's for those that are None."""
        return (
            self.epsilon_inside if epsilon_inside is None else checks.boolean("epsilon_inside", epsilon_inside),
            self.decoupled_decay if decoupled_decay is None else checks.boolean("decoupled_decay", decoupled_decay),
        )


def default(value: float) -> float:
    """Return the default value of an argument, which marks it as not passed by the caller.

    A float like any other, known by its identity: programs that read a signature write what they find to files.
    """
    _defaults.append(float(str(value)))  # a new object
    return _defaults[-1]


_defaults: list[float] = []


def _is_default(value: object) -> bool:
    return any(value is each for each in _defaults)


_TENSORFLOW = Dialect("TensorFlow 2.21, ResourceApplyAdagradV2 and tf.keras.optimizers.legacy",
                      learning_rate=0.001, epsilon=1e-7, initial_accumulator_value=0.1)  # fmt: skip

# fmt: off
DIALECTS: Mapping[str, Dialect] = MappingProxyType({
    "mxnet": Dialect("MXNet 2.0.0b1", learning_rate=0.01, epsilon=1e-6, initial_accumulator_value=0.0,
                     has_row_wise=True),
    "mxnet1": Dialect("MXNet 1.9.1", learning_rate=None, epsilon=1e-7, initial_accumulator_value=0.0,
                      epsilon_inside=True, decoupled_decay=True, row_wise_epsilon=1e-5, has_row_wise=True),
    "torch": Dialect("PyTorch 2.13", learning_rate=0.01, epsilon=1e-10, initial_accumulator_value=0.0),
    "optax": Dialect("optax 0.2.8", learning_rate=None, epsilon=1e-7, initial_accumulator_value=0.1,
                     epsilon_inside=True),
    "keras": Dialect("Keras 3.15", learning_rate=0.001, epsilon=1e-7, initial_accumulator_value=0.1,
                     epsilon_inside=True, decoupled_decay=True),
    "tensorflow": _TENSORFLOW,
    "tf": _TENSORFLOW,
    "fbgemm": Dialect("FBGEMM 1.8, EXACT_ADAGRAD and EXACT_ROWWISE_ADAGRAD",
                      learning_rate=0.01, epsilon=1e-8, initial_accumulator_value=0.0, has_row_wise=True),
    "mlx": Dialect("MLX 0.32", learning_rate=None, epsilon=1e-8, initial_accumulator_value=0.0),
})
# fmt: on
"""The dialects by name; :class:`~adagrad.AdaGrad` uses ``"mxnet"`` by default."""


def find(name: str) -> Dialect:
    """Return the dialect ``name``; ValueError, which lists the known names, if it is unknown."""
    if checks.string("dialect", name) not in DIALECTS:
        raise ValueError(f"dialect={name!r}: must be one of {', '.join(map(repr, DIALECTS))}")
    return DIALECTS[name]
