"""What messages call the arguments of an update, and the message for a row id, which several modules give."""

from __future__ import annotations

from typing import NamedTuple, NoReturn


class Names(NamedTuple):
    """Of one update."""

    weight: str
    grad: str
    history: str
    master: str
    state: str

    @property
    def values(self) -> str:
        return f"values of {self.grad}"

    @property
    def indices(self) -> str:
        return f"indices of {self.grad}"


def in_lists(k: int) -> Names:
    """Those at position ``k`` of the lists of :meth:`adagrad.Optimizer.update`."""
    state = f"states[{k}]"
    return Names(f"weights[{k}]", f"grads[{k}]", f"history in {state}", f"master copy in {state}", state)


def of_parameter(k: int, called: str | None = None) -> Names:
    """Those of a parameter of :class:`adagrad.torch.Adagrad`, by its name or else its position ``k`` in all groups."""
    name = f"parameter[{k}]" if called is None else f"parameter {called!r}"
    return Names(name, f"gradient of {name}", f"sum of {name}", f"master of {name}", f"state of {name}")


def refuse_row(names: Names, position: int, row: int, rows: int) -> NoReturn:
    raise IndexError(f"{names.indices}: indices[{position}]={row}: must be in [0, {rows}), the weight's rows")
