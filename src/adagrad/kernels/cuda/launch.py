"""Launching Triton kernels with as little host time as possible.

At each launch Triton inspects every argument and option to find the compiled form that they need: 20 to 30 us. Here a
compiled kernel is looked up by what Triton would have inspected, which takes half of that. Launch hooks are called as
before; compilation settings (Triton's knobs) that change later have no effect on a kernel that has been launched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from adagrad.kernels.cuda.rule import TRITON

_KEEPS = TRITON >= (3, 3) and torch.version.hip is None
"""Whether compiled kernels are kept. Older versions call a compiled kernel with other arguments; for devices other than
NVIDIA's, Triton inspects more of the arguments than :func:`form_and_words`."""

_HIGH = 2**31


class Kernel:
    """A Triton function with its constants.

    It is compiled without fused multiply-add: each operation is rounded on its own.
    """

    def __init__(self, function: Any, warps: int, **constants: Any) -> None:
        self._function, self._constants = function, constants
        self._options = {"num_warps": warps, "enable_fp_fusion": False}
        names = inspect.signature(function.fn).parameters
        self._values = tuple(constants[name] for name in names if name in constants)
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def bind(self, programs: int, *arguments: Any) -> Callable[[], object]:
        """What launches ``programs`` programs on the current device.

        ``arguments`` are those that precede the constants, as in :func:`form_and_words`. The kernel is compiled and
        loaded now, as far as Triton lets us: that takes seconds, and may fail.
        """
        return self.bind_known(programs, arguments, *form_and_words(arguments))

    def bind_known(
        self, programs: int, arguments: tuple[Any, ...], form: tuple[Any, ...], words: list[Any]
    ) -> Callable[[], object]:
        """As :meth:`bind`, if their form and words are known: those of another kernel with the same arguments."""
        try:
            compiled = self._compiled[form]
        except KeyError:
            compiled = self._compiled[form] = self._compile(programs, *arguments)
        if compiled is None:
            return partial(self._function[(programs,)], *arguments, **self._constants, **self._options)
        return partial(_start, arguments, compiled[(programs, 1, 1)], *words, *self._values)

    def _compile(self, programs: int, *arguments: Any) -> Any:
        """The compiled kernel, or None if it can only be launched through Triton."""
        warmup = getattr(self._function, "warmup", None)  # the interpreter compiles nothing, and had none before 3.6
        if warmup is None:
            return None
        found = warmup(*arguments, grid=(programs,), **self._constants, **self._options)
        found = found.result() if hasattr(found, "result") else found  # where Triton compiles in other threads
        return found if _KEEPS and hasattr(type(found), "__getitem__") else None

    def launch(self, programs: int, *arguments: Any) -> None:
        """Launch at once."""
        self.bind(programs, *arguments)()


def _start(kept: object, compiled: Callable[..., object], *words: Any) -> object:
    """Launch a compiled kernel; ``kept`` are the tensors at the addresses among its ``words``, alive until here."""
    return compiled(*words)


def form_and_words(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Any]]:
    """What Triton may compile into a kernel for NVIDIA's devices about its arguments; and what a launch is given.

    Arguments are tensors, of which the first tells the device, integers or None. A launch is given the addresses of the
    tensors on the device: given a tensor, it would ask Python for the address, and the driver whether that is valid.
    Memory elsewhere, which is pinned, may have another address on the device, and so is given as a tensor.
    """
    device = arguments[0].get_device()
    form: list[Any] = [device]
    words: list[Any] = []
    for argument in arguments:
        if argument is None:
            form.append(None)
            words.append(None)
        elif type(argument) is int:
            form.append((argument % 16 == 0, argument == 1, -_HIGH <= argument < _HIGH))
            words.append(argument)
        else:
            address = argument.data_ptr()
            form.append(argument.dtype)
            form.append(address % 16 == 0)
            words.append(address if argument.get_device() == device else argument)
    return tuple(form), words
