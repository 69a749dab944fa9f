"""MXNet's state files: the ones it wrote, and objects that pickle as its own do, without it."""

from __future__ import annotations

import pickle
import struct
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adagrad.mxnet_states import MXNetOptimizer, decode

DATA = Path(__file__).parent / "data" / "states"
FILES = sorted(DATA.glob("*.states"))


def saved(
    array: np.ndarray, magic: int = 0xF993FACA, flag: int | None = None, device: tuple[int, int] = (1, 0)
) -> bytearray:
    """The bytes that NDArray::Save makes of a dense array."""
    if flag is None:
        flag = {"float32": 0, "float64": 1, "float16": 2}[array.dtype.name]
    shape = struct.pack(f"<i{array.ndim}q", array.ndim, *array.shape)
    return bytearray(struct.pack("<Ii", magic, 0) + shape + struct.pack("<3i", *device, flag) + array.tobytes())


class Saved:
    """Pickles as MXNet's arrays do; the subclasses below go by MXNet's names."""

    def __init__(self, raw: bytearray | None) -> None:
        self.raw = raw

    def __reduce__(self) -> Any:
        return type(self), (None,), {"handle": self.raw}


CLASSES = {
    name: type(name.rpartition(".")[2], (base,), {"__module__": name.rpartition(".")[0]})
    for base, names in {
        Saved: (
            "mxnet.ndarray.ndarray.NDArray",
            "mxnet.ndarray.sparse.RowSparseNDArray",
            "mxnet.numpy.multiarray.ndarray",
        ),
        object: (
            "mxnet.optimizer.adagrad.AdaGrad",
            "mxnet.optimizer.contrib.GroupAdaGrad",
            "mxnet.optimizer.adam.Adam",
            *(f"mxnet.lr_scheduler.{kind}Scheduler" for kind in ("Factor", "MultiFactor", "Poly", "Cosine", "My")),
        ),
    }.items()
    for name in names
}
NDARRAY = CLASSES["mxnet.ndarray.ndarray.NDArray"]


@contextmanager
def importable() -> Iterator[None]:
    """Within: ``CLASSES`` can be imported, which pickling asks for."""
    with pytest.MonkeyPatch.context() as patch:
        for name, cls in CLASSES.items():
            parts = name.split(".")
            for depth in range(1, len(parts)):
                path = ".".join(parts[:depth])
                patch.setitem(sys.modules, path, sys.modules.get(path) or types.ModuleType(path))
            patch.setattr(sys.modules[cls.__module__], parts[-1], cls, raising=False)
        yield


def instance(name: str, attributes: dict[str, Any]) -> Any:
    made = CLASSES[name]()
    made.__dict__.update(attributes)
    return made


def adagrad(name: str = "adagrad.AdaGrad", **changes: Any) -> Any:
    counts = {0: 3, "a": 2}
    attributes = {"rescale_grad": 1.0, "lr_scheduler": None, "lr": 0.01, "wd": 0.0, "lr_mult": {}, "wd_mult": {}}
    attributes |= {"begin_num_update": 0, "num_update": 3, "_all_index_update_counts": {0: counts}}
    attributes |= {"_index_update_count": counts, "clip_gradient": None, "multi_precision": False, "aggregate_num": 1}
    attributes |= {"idx2name": {}, "sym_info": (), "allow_np_array": True, "use_fused_step": True, "epsilon": 1e-6}
    attributes |= changes
    return instance(
        f"mxnet.optimizer.{name}", {key: value for key, value in attributes.items() if value is not KeyError}
    )


def read_optimizer(optimizer: Any, protocol: int = 4) -> MXNetOptimizer:
    found = decode(pickle.dumps(({}, optimizer), protocol))[1]
    assert found is not None
    return found
