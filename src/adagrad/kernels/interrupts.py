"""Interrupts such as Ctrl-C: Python notices them only after compiled code has done its work, which then counts."""

from __future__ import annotations


def mark_late(interrupt: BaseException) -> None:
    """Mark an interrupt as noticed only after the work was done."""
    interrupt.came_late = True  # type: ignore[attr-defined]


def came_late(interrupt: BaseException) -> bool:
    """Whether an interrupt was noticed only after the work was done, which then counts."""
    return getattr(interrupt, "came_late", False)
