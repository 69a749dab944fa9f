"""The records that describe updates to the kernels: rows of 64-bit integers, whose positions are named here.

It imports nothing, because the kernels of CPU and CUDA, and the code that fills in such rows, share it.
"""

from __future__ import annotations

WEIGHT, GRAD, HISTORY, MASTER = range(4)
"""The operands of an update."""

# A dense update is a row of the address table: the addresses of its operands (0 for no master copy), the number of
# elements and, if the history is row-wise, the elements of a row, else 0.
SIZE, ROW_LENGTH, COLUMNS = range(4, 7)

# A row-sparse update has a fifth operand, its row ids. Its words: the number of ids, the elements of a row, the number
# of rows of the weight, whether the ids have 64 bits; the addresses where each operand begins and ends; the bytes from
# a row to the next, of all operands but the ids; the address of the checked copy of the ids, whether they strictly
# increase; the addresses of the rates, of the rule's scalars, of what workers found of the ids, of what they grouped
# and of scratch memory.
IDS = 4
ENTRIES, LENGTH, HEIGHT, ARE_LONG = range(4)
BASE, ENDS, STRIDE = 4, 9, 14
CHECKED_IDS, ARE_INCREASING, RATES, SCALARS, FOUND, GROUPS, SCRATCH, FACTS = range(18, 26)
