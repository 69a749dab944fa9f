"""What a call of compiled code says that it did with a list of updates. Any other number is that of workers wanted."""

DONE, LARGE, LEFT, OUT_OF_RANGE, NO_MEMORY = -5, -4, -3, -2, -1
"""All; nothing, because it was tried as a small one and is not so small; nothing, because it is not plain or not on the
CPU; nothing, because a row id is outside its weight; not all, because there was no memory for sums."""
