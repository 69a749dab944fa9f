"""The AdaGrad optimizer for NumPy arrays and PyTorch tensors, with dense and row-sparse gradients."""

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
