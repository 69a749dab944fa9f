"""The AdaGrad optimizer, exact and as fast as memory, for NumPy arrays and PyTorch tensors, dense and row-sparse."""

from typing import TYPE_CHECKING

from adagrad import lr_scheduler
from adagrad.adagrad import AdaGrad
from adagrad.group_adagrad import GroupAdaGrad
from adagrad.optimizer import Optimizer, create, register
from adagrad.row_sparse import RowSparse
from adagrad.updater import Updater, get_updater

__all__ = [
    "AdaGrad",
    "GroupAdaGrad",
    "Optimizer",
    "RowSparse",
    "Updater",
    "create",
    "get_updater",
    "lr_scheduler",
    "register",
]

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        if name == "__version__":  # looked up when it is asked for: it takes longer than the whole import
            from importlib.metadata import version

            return version("adagrad")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
