"""Argument checks. A message names the argument, its value and the rule it broke."""

from __future__ import annotations

import math
import numbers
import sys
from typing import Any

import numpy as np

_MOST = sys.float_info.max
_LARGEST = 2**63 - 1


def describe(value: object) -> str:
    """``value`` as a message shows it: its repr, cut to a line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def real(name: str, value: Any) -> float:
    """``value`` as a float; TypeError unless it is a real number (a bool is not)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={describe(value)}: must be a number, not {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        beyond: Any = value  # an integer that no float reaches
        return math.inf if beyond > 0 else -math.inf


def finite(name: str, value: Any) -> float:
    """``value`` as a finite float of any sign."""
    if type(value) is float and -math.inf < value < math.inf:
        return value
    number = real(name, value)
    if not math.isfinite(number):
        raise ValueError(f"{name}={describe(value)}: must be finite")
    return number


def non_negative(name: str, value: Any) -> float:
    """``value`` as a finite float >= 0."""
    if type(value) in (float, int) and 0 <= value <= _MOST:  # the usual case, at every step: quickly
        return float(value)
    number = real(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name}={describe(value)}: must be {'>= 0' if number < 0 else 'finite and >= 0'}")
    return number


def positive_or_none(name: str, value: Any) -> float | None:
    """``value`` as a finite float > 0, or None."""
    if value is None:
        return None
    number = real(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}={describe(value)}: must be None or {'> 0' if number <= 0 else 'finite and > 0'}")
    return number


def integer(name: str, value: Any, minimum: int) -> int:
    """``value`` as an int >= ``minimum``, below 2^63."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}={describe(value)}: must be an integer, not {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name}={describe(value)}: must be >= {minimum}")
    if int(value) > _LARGEST:
        raise ValueError(f"{name}={describe(value)}: must be < 2**63")
    return int(value)


def at_least_one(name: str, value: Any) -> float:
    """``value``, finite and >= 1: an int, or a float if it is none."""
    if isinstance(value, numbers.Integral):
        return integer(name, value, 1)
    number = finite(name, value)
    if number < 1:
        raise ValueError(f"{name}={describe(value)}: must be >= 1")
    return number


def string(name: str, value: Any) -> str:
    """``value`` as a str."""
    if not isinstance(value, str):
        raise TypeError(f"{name}={describe(value)}: must be a string, not {type(value).__name__}")
    return value


def boolean(name: str, value: Any) -> bool:
    """``value`` as a bool; a number is none."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}={describe(value)}: must be True or False, not {type(value).__name__}")
    return bool(value)
