"""The AdaGrad optimizer for NumPy arrays and PyTorch tensors, with dense and row-sparse gradients."""

import importlib
from typing import TYPE_CHECKING, Any

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

__version__ = "1.0.0"


if TYPE_CHECKING:
    from adagrad import convert as convert, torch as torch
else:

    def __getattr__(name: str) -> Any:
        if name in ("convert", "torch"):  # imported at first use: most programs need none of it, or have no PyTorch
            try:
                return importlib.import_module(f"adagrad.{name}")
            except ModuleNotFoundError as error:
                if error.name != "torch":
                    raise
                raise AttributeError("adagrad.torch: PyTorch is not installed: pip install 'adagrad[torch]'") from error
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), "convert", "torch"})
