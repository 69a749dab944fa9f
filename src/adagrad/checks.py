"""Argument checks. Messages name the argument, its value and the rule it broke."""

from __future__ import annotations

import math
import numbers
import sys
from typing import Any, TypeGuard

import numpy as np

_MOST = sys.float_info.max
_LARGEST = 2**63 - 1


def describe(value: object) -> str:
    """Return the repr of ``value``, cut to one line, for messages."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def caller() -> int:
    """Return the ``stacklevel`` at which :func:`warnings.warn`, called by the function that calls this, names the
    first caller outside of this package and of the imports that it makes."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in (__package__, "importlib"):
        frame = frame.f_back
        file = frame.f_code.co_filename
        level += not ("importlib" in file and "_bootstrap" in file)  # warnings do not count those
    return level


def unpacked(value: Any) -> Any:
    """The element of a 0-d NumPy array; anything else as it is."""
    return value.item() if type(value) is np.ndarray and value.ndim == 0 else value


def real(name: str, value: Any) -> float:
    """Return ``value`` as a float; TypeError unless it is a real number, not a bool, or a 0-d NumPy array of one."""
    value = unpacked(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={describe(value)}: must be a number, not {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        beyond: Any = value  # an integer beyond the range of floats
        return math.inf if beyond > 0 else -math.inf


def finite(name: str, value: Any) -> float:
    """Return ``value`` as a finite float of any sign."""
    if type(value) is float and -math.inf < value < math.inf:
        return value
    number = real(name, value)
    if not math.isfinite(number):
        raise ValueError(f"{name}={describe(value)}: must be finite")
    return number


def is_rate(value: Any) -> TypeGuard[float]:
    """Whether ``value`` is a float, finite and >= 0: what :func:`non_negative` makes sure of, for many of them."""
    return type(value) is float and 0 <= value <= _MOST


def non_negative(name: str, value: Any) -> float:
    """Return ``value`` as a finite float >= 0."""
    if type(value) in (float, int) and 0 <= value <= _MOST:  # fast path for the usual case, taken at every step
        return float(value)
    number = real(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name}={describe(value)}: must be {'>= 0' if number < 0 else 'finite and >= 0'}")
    return number


def positive_or_none(name: str, value: Any) -> float | None:
    """Return ``value`` as a finite float > 0, or None."""
    if value is None:
        return None
    number = real(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}={describe(value)}: must be None or {'> 0' if number <= 0 else 'finite and > 0'}")
    return number


def integer(name: str, value: Any, minimum: int) -> int:
    """Return ``value`` as an int >= ``minimum`` and below 2^63."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}={describe(value)}: must be an integer, not {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name}={describe(value)}: must be >= {minimum}")
    if int(value) > _LARGEST:
        raise ValueError(f"{name}={describe(value)}: must be < 2**63")
    return int(value)


def at_least_one(name: str, value: Any) -> float:
    """Return ``value``, finite and >= 1, as an int if it is integral, else as a float."""
    if isinstance(value, numbers.Integral):
        return integer(name, value, 1)
    number = finite(name, value)
    if number < 1:
        raise ValueError(f"{name}={describe(value)}: must be >= 1")
    return number


def string(name: str, value: Any) -> str:
    """Return ``value``; TypeError unless it is a str."""
    if not isinstance(value, str):
        raise TypeError(f"{name}={describe(value)}: must be a string, not {type(value).__name__}")
    return value


def boolean(name: str, value: Any) -> bool:
    """Return ``value`` as a bool; TypeError unless it is one (a number is not)."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}={describe(value)}: must be True or False, not {type(value).__name__}")
    return bool(value)
