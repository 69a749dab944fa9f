"""The AdaGrad optimizer, exact and as fast as memory, for NumPy arrays and PyTorch tensors, dense and row-sparse."""

from contextlib import suppress
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
        if name == "__version__":  # read from the disk when it is asked for: nearly as long as the whole import
            from importlib.metadata import PackageNotFoundError, version

            with suppress(PackageNotFoundError):
                return version("adagrad")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
