"""What became of a list of updates."""

from __future__ import annotations

# What a call of compiled code says that it did. Any other number is that of the workers that are wanted.

DONE, LARGE, LEFT, OUT_OF_RANGE, NO_MEMORY = -5, -4, -3, -2, -1
"""All; nothing, because it was tried as a small one and is not so small; nothing, because it is not plain or not on the
CPU; nothing, because a row id is outside its weight; not all, because there was no memory for sums."""


def mark_late(interrupt: BaseException) -> None:
    """Say of an interrupt, as Ctrl-C is, that it was noticed when the work was done."""
    interrupt.came_late = True  # type: ignore[attr-defined]


def came_late(interrupt: BaseException) -> bool:
    """Whether an interrupt was noticed when the work was done: then it counts."""
    return getattr(interrupt, "came_late", False)
