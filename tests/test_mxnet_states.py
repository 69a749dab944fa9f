"""MXNet's state files: real ones decode bit for bit, hostile ones neither run nor allocate."""

from __future__ import annotations

import collections
import io
import json
import math
import pickle
import pickletools
import struct
import sys
import tracemalloc
import types
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from adagrad import AdaGrad, checkpoint, get_updater
from adagrad.mxnet_states import MXNetOptimizer, decode, is_mxnet_states

DATA = Path(__file__).parent / "data" / "states"
FILES = sorted(DATA.glob("*.states"))
UNREADABLE = "not an MXNet state file that can be read"

# ---------------------------------------------------------------------------------------------- what MXNet really wrote


def recorded(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with np.load(path.with_suffix(".npz")) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, json.loads(str(arrays.pop("config")))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_states_equal_what_mxnet_held(path: Path) -> None:
    arrays, config = recorded(path)
    data = path.read_bytes()
    assert is_mxnet_states(data)
    states, _ = decode(data)
    assert list(states) == config["indices"]
    for key, state in states.items():
        assert isinstance(state, tuple) == config["multi_precision"]
        parts = state if isinstance(state, tuple) else (state,)
        names = ("master", "h") if config["multi_precision"] else ("h",)
        for name, part in zip(names, parts, strict=True):
            expected = arrays[f"{name}/{key}"]
            assert (part.dtype, part.shape) == (expected.dtype, expected.shape)
            assert part.tobytes() == expected.tobytes()
            assert part.flags.writeable
            assert part.flags.c_contiguous
            assert part.flags.aligned


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_hyper_parameters_are_the_given_ones(path: Path) -> None:
    _, config = recorded(path)
    _, optimizer = decode(path.read_bytes())
    if not config["dump_optimizer"]:
        assert optimizer is None
        return
    assert optimizer is not None
    names = ("rescale_grad", "wd", "clip_gradient", "epsilon", "num_update", "multi_precision")
    assert {name: getattr(optimizer, name) for name in names} == {name: config[name] for name in names}
    assert (optimizer.name, optimizer.lr, optimizer.begin_num_update) == ("AdaGrad", config["learning_rate"], 0)
    assert optimizer.index_update_count == dict.fromkeys(config["indices"], 3)
    assert (optimizer.lr_mult, optimizer.wd_mult, optimizer.idx2name) == ({}, {}, {})
    if config["scheduler"] is None:
        assert optimizer.scheduler is None
        return
    name, given_arguments = config["scheduler"]
    assert optimizer.scheduler is not None
    if config["learning_rate"] is not None:
        given_arguments["base_lr"] = config["learning_rate"]
    assert optimizer.scheduler[0] == name
    assert given_arguments.items() <= optimizer.scheduler[1].items()


def learning_rate(optimizer: MXNetOptimizer, update: int) -> float:
    """MXNet's learning rate at ``update``, which is after the warm-up of every recorded schedule."""
    if optimizer.scheduler is None:
        assert optimizer.lr is not None
        return optimizer.lr
    name, given_arguments = optimizer.scheduler
    lr: float = given_arguments["base_lr"]
    if name == "CosineScheduler":
        start, end, final = (given_arguments[key] for key in ("warmup_steps", "max_update", "final_lr"))
        return final + (lr - final) * (1 + math.cos(math.pi * (update - start) / (end - start))) / 2
    step = given_arguments["step"]
    for border in step if isinstance(step, list) else range(step, update, step):
        lr *= given_arguments["factor"] if update > border else 1
    return lr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_step_after_gives_mxnets_bits(path: Path) -> None:
    arrays, config = recorded(path)
    states, optimizer = decode(path.read_bytes())
    f32 = np.float32
    for key, state in states.items():
        master, history = state if isinstance(state, tuple) else (arrays[f"w/{key}"], state)
        lr = config["learning_rate"] if optimizer is None else learning_rate(optimizer, optimizer.num_update + 1)
        clip = f32(config["clip_gradient"])
        grad = np.clip(arrays[f"next_g/{key}"].astype(f32) * f32(config["rescale_grad"]), -clip, clip)
        grad += f32(config["wd"]) * master
        history += grad * grad
        master = master - f32(lr) * (grad / (np.sqrt(history) + f32(config["epsilon"])))
        assert master.astype(arrays[f"w/{key}"].dtype).tobytes() == arrays[f"next_w/{key}"].tobytes()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_truncation_is_refused(path: Path) -> None:
    data = path.read_bytes()
    for size in range(len(data)):
        with pytest.raises(ValueError, match=UNREADABLE):
            decode(data[:size])


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(FILES), st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 255)), min_size=1, max_size=4))
def test_altered_bytes_are_refused_or_decode(path: Path, edits: list[tuple[int, int]]) -> None:
    data = bytearray(path.read_bytes())
    for place, mask in edits:
        data[place % len(data)] ^= mask
    decode_or_refuse(data)


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 5), st.binary(max_size=60))
def test_any_bytes_are_refused_or_decode(protocol: int, program: bytes) -> None:
    decode_or_refuse(bytes([0x80, protocol]) + program + b".")


def decode_or_refuse(data: bytes | bytearray) -> None:
    try:
        states, optimizer = decode(data)
    except ValueError as error:
        if UNREADABLE not in str(error):
            raise
    else:
        assert isinstance(states, dict)
        assert optimizer is None or isinstance(optimizer, MXNetOptimizer)


# ------------------------------------------------------------------------- files as MXNet would write them, without it


def saved(
    array: np.ndarray, magic: int = 0xF993FACA, flag: int | None = None, device: tuple[int, int] = (1, 0)
) -> bytearray:
    """The bytes that NDArray::Save makes of a dense array."""
    if flag is None:
        flag = {"float32": 0, "float64": 1, "float16": 2}[array.dtype.name]
    shape = struct.pack(f"<i{array.ndim}q", array.ndim, *array.shape)
    return bytearray(struct.pack("<Ii", magic, 0) + shape + struct.pack("<3i", *device, flag) + array.tobytes())


def saved_rows(array: np.ndarray, rows: list[int], shape: tuple[int, ...], kind: int = 6) -> bytearray:
    """The bytes that NDArray::Save makes of a row-sparse array with these rows."""

    def packed(sizes: tuple[int, ...]) -> bytes:
        return struct.pack(f"<i{len(sizes)}q", len(sizes), *sizes)

    head = struct.pack("<Ii", 0xF993FAC9, 1) + packed(array.shape) + packed(shape) + struct.pack("<4i", 1, 0, 0, kind)
    return bytearray(head + packed((len(rows),)) + array.tobytes() + np.array(rows, "<i8").tobytes())


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


@pytest.fixture(scope="module", autouse=True)
def mxnet() -> Any:
    """Makes ``CLASSES`` importable, which pickling asks for."""
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


def scheduler(name: str, **changes: Any) -> Any:
    attributes = {
        "base_lr": 0.4,
        "warmup_steps": 0,
        "warmup_final_lr": 0.4,
        "warmup_begin_lr": 0,
        "warmup_mode": "linear",
    }
    attributes |= {
        "Factor": {"step": 2, "factor": 0.5, "stop_factor_lr": 1e-8, "count": 2, "base_lr": 0.2},
        "MultiFactor": {"step": [1, 2, 9], "cur_step_ind": 2, "factor": 0.5, "count": 2, "base_lr": 0.1},
        "Poly": {"power": 2, "base_lr_orig": 0.4, "max_update": 9, "final_lr": 0, "max_steps": 9},
        "Cosine": {"base_lr_orig": 0.4, "max_update": 9, "final_lr": 0, "max_steps": 9},
        "My": {},
    }[name]
    return instance(f"mxnet.lr_scheduler.{name}Scheduler", attributes | changes)


def read_optimizer(optimizer: Any, protocol: int = 4) -> MXNetOptimizer:
    found = decode(pickle.dumps(({}, optimizer), protocol))[1]
    assert found is not None
    return found


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("pickler", ["C", "Python", "optimized"])
@pytest.mark.parametrize("kind", ["mxnet.ndarray.ndarray.NDArray", "mxnet.numpy.multiarray.ndarray"])
def test_every_protocol_reads_the_same(protocol: int, pickler: str, kind: str) -> None:
    arrays = [
        np.arange(1200, dtype=np.float32).reshape(40, 30),
        np.array(2.5, np.float64),
        np.zeros((0, 3), np.float16),
    ]
    made = [CLASSES[kind](saved(array)) for array in arrays]
    many = {
        f"tiny_{number}": (CLASSES[kind](saved(arrays[1])), CLASSES[kind](saved(arrays[1]))) for number in range(2500)
    }
    states = {0: made[0], "0": (made[1], made[2]), -(2**40): None, 70_000: [], 300: ((),)} | many
    file = io.BytesIO()
    (pickle._Pickler if pickler == "Python" else pickle.Pickler)(file, protocol).dump((states, adagrad()))
    data = pickletools.optimize(file.getvalue()) if pickler == "optimized" else file.getvalue()
    assert is_mxnet_states(data)
    read, optimizer = decode(data)
    assert optimizer == read_optimizer(adagrad())
    assert [(type(key), key) for key in read] == [(type(key), key) for key in states]
    assert read[-(2**40)] is None
    assert (read[70_000], read[300]) == ([], ((),))
    for found, array in zip((read[0], *read["0"]), arrays, strict=True):
        assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert all(part == 2.5 for name in many for part in read[name])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([np.float16, np.float32, np.float64]).flatmap(
        lambda dtype: hnp.arrays(f"u{np.dtype(dtype).itemsize}", hnp.array_shapes(min_dims=0, max_side=4)).map(
            lambda bits: bits.view(dtype)
        )
    ),
    st.sampled_from([(1, 0), (2, 7), (3, 0), (5, 0)]),
)
def test_any_array_reads_bit_for_bit(array: np.ndarray, device: tuple[int, int]) -> None:
    for magic in (0xF993FAC9, 0xF993FACA)[array.ndim == 0 :]:
        states, _ = decode(pickle.dumps({0: NDARRAY(saved(array, magic, None, device))}))
        assert (states[0].dtype, states[0].shape, states[0].tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_bfloat16_is_widened() -> None:
    bits = np.arange(0, 2**16, 7, np.uint16)
    states, _ = decode(pickle.dumps({0: NDARRAY(saved(bits, flag=12))}))
    assert states[0].dtype == np.float32
    assert (states[0].view(np.uint32) == bits.astype(np.uint32) << 16).all()


def row_sparse(*raws: bytearray) -> dict[Any, Any]:
    made = [CLASSES["mxnet.ndarray.sparse.RowSparseNDArray"](raw) for raw in raws]
    return decode(pickle.dumps(dict(enumerate(made))))[0]


def test_row_sparse_states_become_dense() -> None:
    full = np.arange(6, dtype=np.float32).reshape(3, 2)
    states = row_sparse(
        saved_rows(full, [0, 1, 2], (3, 2)), saved_rows(full, [1, 3, 4], (6, 2)), saved_rows(full[:0], [], (2, 2))
    )
    assert (states[0] == full).all()
    assert (states[1] == [[0, 0], [0, 1], [0, 0], [2, 3], [4, 5], [0, 0]]).all()
    assert (states[2] == np.zeros((2, 2))).all()


@pytest.mark.parametrize(
    ("reason", "raw"),
    [
        ("1 of 1000000 rows: the file is too short", saved_rows(np.zeros((1, 2), "f4"), [5], (1_000_000, 2))),
        ("out of order or out of range", saved_rows(np.zeros((2, 2), "f4"), [1, 1], (2, 2))),
        ("out of order or out of range", saved_rows(np.zeros((2, 2), "f4"), [1, 0], (2, 2))),
        ("out of order or out of range", saved_rows(np.zeros((2, 2), "f4"), [0, 2], (2, 2))),
        ("out of order or out of range", saved_rows(np.zeros((2, 2), "f4"), [-1, 0], (2, 2))),
        ("with rows of shape", saved_rows(np.zeros((2, 2), "f4"), [0, 1], (2, 3))),
        ("with rows of shape", saved_rows(np.zeros((2, 2), "f4"), [0, 1, 2], (3, 2))),
        ("with rows of shape", saved_rows(np.zeros((2, 2), "f4"), [0, 1], (2, 2), kind=4)),
        ("an array has no value", saved_rows(np.zeros((1, 1), "f4"), [0], ())),
    ],
)
def test_bad_row_sparse_states_are_refused(reason: str, raw: bytearray) -> None:
    with pytest.raises(ValueError, match=reason):
        row_sparse(raw)


def test_row_sparse_states_share_one_allowance() -> None:
    raw = saved_rows(np.zeros((1, 1), np.float32), [5], (1500, 1))  # 6,000 bytes each, in a file of some 15,000
    row_sparse(raw, saved_rows(np.zeros((1000, 1), np.float32), list(range(1000)), (1000, 1)))
    with pytest.raises(ValueError, match="too short to justify"):
        row_sparse(*[bytearray(raw) for _ in range(100)])


SMALL = saved(np.ones((2, 3), np.float32))


@pytest.mark.parametrize(
    ("reason", "raw"),
    [
        ("0x1: |0xf993fac8, which is neither", struct.pack("<I", 0xF993FAC8) + SMALL[4:]),
        ("storage type 2", SMALL[:4] + struct.pack("<i", 2) + SMALL[8:]),
        ("storage type -1", SMALL[:4] + struct.pack("<i", -1) + SMALL[8:]),
        ("-1 dimensions", SMALL[:8] + struct.pack("<i", -1)),
        ("33 dimensions", SMALL[:8] + struct.pack("<i", 33) + SMALL[12:]),
        ("an array has no value", struct.pack("<Iii", 0xF993FAC9, 0, 0)),
        ("an array has no value", None),
        (r"shape \(-2, 3\)", SMALL[:12] + struct.pack("<q", -2) + SMALL[20:]),
        ("truncated: 27670116110564327424 bytes", SMALL[:12] + struct.pack("<q", 2**61) + SMALL[20:]),
        ("too big|too large", SMALL[:12] + struct.pack("<qq", 2**62, 0) + SMALL[28:40]),
        ("device of kind 9", saved(np.ones(3, np.float32), device=(9, 0))),
        ("dtype 4", saved(np.ones(3, np.int32), flag=4)),
        ("dtype 7", saved(np.ones(3, np.bool_), flag=7)),
        ("4 bytes too many", SMALL + b"1234"),
        ("truncated", SMALL[:-1]),
        ("truncated", b""),
    ],
)
def test_bad_arrays_are_refused(reason: str, raw: Any) -> None:
    with pytest.raises(ValueError, match=reason):
        decode(pickle.dumps({0: NDARRAY(raw if raw is None else bytearray(raw))}))


# --------------------------------------------------------------------------------------------------------- optimizers


def test_attributes_are_read() -> None:
    found = read_optimizer(
        adagrad(
            "contrib.GroupAdaGrad",
            rescale_grad=np.float64(0.125),
            lr=np.float32(0.1),
            wd=1,
            clip_gradient=np.float16(0.5),
            epsilon=0,
            begin_num_update=np.int64(2),
            num_update=2**40,
            lr_mult=collections.OrderedDict({"a": 2, 0: 0.5}),
            wd_mult={"b": 0.0},
            idx2name=collections.OrderedDict({0: "a"}),
            multi_precision=np.True_,
            aggregate_num=math.inf,
            use_fused_step=0,
            sym_info=({"a": {"__lr_mult__": "1"}}, ["a"]),
            something_new=[None, {"x": b"y"}],
        )
    )
    assert found == MXNetOptimizer(
        name="GroupAdaGrad",
        rescale_grad=0.125,
        lr=float(np.float32(0.1)),
        wd=1.0,
        clip_gradient=0.5,
        epsilon=0.0,
        begin_num_update=2,
        num_update=2**40,
        index_update_count={0: 3, "a": 2},
        lr_mult={"a": 2.0, 0: 0.5},
        wd_mult={"b": 0.0},
        idx2name={0: "a"},
        multi_precision=True,
        scheduler=None,
    )
    config = found.config()
    assert (config["class"], config["lr"], config["initial_accumulator_value"]) == ("GroupAdaGrad", found.lr, 0)
    assert not {"name", "scheduler"} & config.keys()


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("AdaGrad has no epsilon", {"epsilon": KeyError}),
        ("AdaGrad has no num_update", {"num_update": KeyError}),
        ("AdaGrad.wd is of type str", {"wd": "0"}),
        ("AdaGrad.wd is of type bool", {"wd": True}),
        ("AdaGrad.epsilon is of type NoneType", {"epsilon": None}),
        ("AdaGrad.lr=nan: must be finite", {"lr": math.nan}),
        ("AdaGrad.rescale_grad=inf: must be finite", {"rescale_grad": math.inf}),
        ("AdaGrad.num_update=-1: must be >= 0", {"num_update": -1}),
        ("AdaGrad.num_update is of type float", {"num_update": 3.0}),
        ("an integer of 9 bytes", {"num_update": 2**64}),
        ("AdaGrad._index_update_count.0.=-1", {"_index_update_count": {0: -1}}),
        ("AdaGrad._index_update_count is of type list", {"_index_update_count": []}),
        ("AdaGrad.lr_mult=inf", {"lr_mult": {0: math.inf}}),
        ("AdaGrad.idx2name is of type int", {"idx2name": {0: 1}}),
        ("a key of type float", {"lr_mult": {0.5: 1.0}}),
        ("a key of type bool", {"lr_mult": {True: 1.0}}),
        ("AdaGrad.lr is of type Array", {"lr": NDARRAY(saved(np.ones((), np.float32)))}),
        ("neither lr nor lr_scheduler", {"lr": None}),
        ("lr_scheduler is of type int", {"lr_scheduler": 3}),
    ],
)
def test_bad_attributes_are_refused(reason: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=reason):
        read_optimizer(adagrad(**changes))


def test_a_scheduler_of_the_users_own_is_kept_out_but_the_states_are_read() -> None:
    found = read_optimizer(adagrad(lr_scheduler=scheduler("My"), lr=0.3))
    assert (found.scheduler, found.lr) == ("custom", 0.3)
    updater = get_updater(AdaGrad(None, lr_scheduler=lambda n: 0.125))
    here = updater.optimizer.lr_scheduler
    optimizer = adagrad(lr_scheduler=scheduler("My"))
    updater.set_states(pickle.dumps(({0: NDARRAY(saved(np.ones(3, np.float32)))}, optimizer)))
    assert updater.optimizer.lr_scheduler is here
    assert updater.optimizer.learning_rate == 0.125
    plain = get_updater(AdaGrad(0.25))
    with pytest.warns(UserWarning, match="custom scheduler"):
        plain.set_states(pickle.dumps(({}, optimizer)))
    assert plain.optimizer.learning_rate == 0.25


def test_a_function_as_a_scheduler_is_not_called() -> None:
    found = read_optimizer(adagrad(lr_scheduler=print))
    assert found.scheduler == "custom"


def test_a_scheduler_in_the_optimizers_place_is_refused() -> None:
    with pytest.raises(ValueError, match=r"refused 'mxnet.lr_scheduler.MyScheduler'"):
        decode(pickle.dumps(({}, scheduler("My"))))
    with pytest.raises(ValueError, match=r"neither an array nor .*mxnet.lr_scheduler.MyScheduler"):
        decode(pickle.dumps({0: scheduler("My")}))


def test_a_schedule_that_was_set_after_the_constructor() -> None:
    # Its base_lr is its own, not what the constructor was given.
    found = read_optimizer(adagrad(lr=0.01, num_update=3, lr_scheduler=scheduler("Factor")))
    assert isinstance(found.scheduler, tuple)
    assert found.scheduler[1]["base_lr"] == 0.4


def test_steps_of_a_schedule_may_be_floats() -> None:
    changes = {"step": 1.5, "count": 3.0, "base_lr": 0.1}
    found = read_optimizer(adagrad(lr=None, num_update=4, lr_scheduler=scheduler("Factor", **changes)))
    assert (found.scheduler[1]["step"], found.scheduler[1]["base_lr"]) == (1.5, 0.4)
    changes = {"step": [1.5, 2.5, 9.0]}
    found = read_optimizer(adagrad(lr=None, num_update=4, lr_scheduler=scheduler("MultiFactor", **changes)))
    assert found.scheduler[1]["step"] == [1.5, 2.5, 9.0]


@pytest.mark.parametrize("data", [pickle.dumps({0: None}, 0), pickle.dumps({0: None}, 1), b"(dp0\nI0\nNs."])
def test_older_protocols_are_refused_by_name(data: bytes) -> None:
    with pytest.raises(ValueError, match="does not start as a pickle of protocol 2 to 5"):
        get_updater(AdaGrad()).set_states(data)


@pytest.mark.parametrize(
    ("kind", "lr", "changes", "expected"),
    [
        ("Factor", None, {}, {"step": 2, "factor": 0.5, "stop_factor_lr": 1e-8, "base_lr": 0.4}),
        ("Factor", 0.08, {"base_lr": 0.04}, {"base_lr": 0.08}),
        ("Factor", None, {"stop_factor_lr": 0.3, "base_lr": 0.3}, {"base_lr": 0.4, "stop_factor_lr": 0.3}),
        ("Factor", 0.08, {"base_lr": 0.04, "warmup_steps": 2}, {"base_lr": 0.08, "warmup_final_lr": 0.4}),
        ("Factor", 0.08, {"base_lr": 0.04, "warmup_begin_lr": 0.1}, {"base_lr": 0.08, "warmup_final_lr": 0.4}),
        ("Factor", None, {"warmup_steps": 5, "count": 0, "base_lr": 0.4}, {"base_lr": 0.4, "warmup_steps": 5}),
        ("MultiFactor", None, {}, {"step": [1, 2, 9], "factor": 0.5, "base_lr": 0.4}),
        ("MultiFactor", 0.01, {"base_lr": 0.0025, "warmup_steps": 1}, {"base_lr": 0.01, "warmup_final_lr": 0.4}),
        ("Poly", None, {"base_lr": 0.17777}, {"max_update": 9, "pwr": 2, "final_lr": 0, "base_lr": 0.4}),
        ("Poly", 0.01, {"base_lr": 0.17777}, {"base_lr": 0.4}),
        ("Poly", None, {"base_lr": 0.1, "final_lr": 0.1, "max_update": 2}, {"final_lr": 0.1, "max_update": 2}),
        ("Cosine", None, {"base_lr": 0.3}, {"max_update": 9, "final_lr": 0, "base_lr": 0.4}),
        ("Cosine", 0.01, {"base_lr": 0.3, "warmup_mode": "constant"}, {"base_lr": 0.4, "warmup_mode": "constant"}),
    ],
)
def test_schedules_start_anew(kind: str, lr: float | None, changes: dict[str, Any], expected: dict[str, Any]) -> None:
    found = read_optimizer(adagrad(lr=lr, lr_scheduler=scheduler(kind, **changes)))
    assert found.lr == lr
    assert found.scheduler is not None
    name, given_arguments = found.scheduler
    assert name == f"{kind}Scheduler"
    assert expected.items() <= given_arguments.items()
    assert ("warmup_final_lr" in given_arguments) == ("warmup_final_lr" in expected)
    assert found.config()["lr_scheduler"] == found.scheduler


@pytest.mark.parametrize(
    ("reason", "kind", "changes"),
    [
        ("FactorScheduler.base_lr=0.3: its schedule gives 0.2 at num_update 3", "Factor", {"base_lr": 0.3}),
        ("something else has changed it", "MultiFactor", {"base_lr": 0.4}),
        ("something else has changed it", "Poly", {"base_lr": 0.1, "max_update": 2}),
        ("factor 1.5", "Factor", {"factor": 1.5}),
        ("count 4 at num_update 3", "Factor", {"count": 4, "base_lr": 0.1}),
        ("step is of type int", "MultiFactor", {"step": 1}),
        ("step is of type str", "MultiFactor", {"step": ["1"]}),
        ("step=-1", "MultiFactor", {"step": [-1]}),
        ("warmup_steps=-1", "Cosine", {"warmup_steps": -1}),
        ("warmup_mode is of type int", "Cosine", {"warmup_mode": 1}),
        ("CosineScheduler.final_lr=-inf", "Cosine", {"final_lr": -math.inf}),
    ],
)
def test_bad_schedules_are_refused(reason: str, kind: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=reason):
        read_optimizer(adagrad(lr=None, lr_scheduler=scheduler(kind, **changes)))


def test_other_contents_are_refused() -> None:
    arrays = [NDARRAY(saved(np.ones(3, np.float32))) for _ in range(2)]
    shared = NDARRAY(arrays[0].raw)
    for reason, content in {
        "holds a list": [1],
        "holds a int": 3,
        "not an optimizer": ({}, {}),
        "is not an optimizer": ({}, scheduler("Cosine")),
        "neither an array nor a tuple of them: int": {0: 3},
        "neither an array nor a tuple of them: dict": {0: {}},
        "neither an array nor a tuple of them: Bytes": {0: b"x"},
        "neither an array nor a tuple of them: AdaGrad": {0: adagrad()},
        "two states share an array": {0: arrays[0], 1: (arrays[1], arrays[0])},
        "two arrays share their bytes": {0: arrays[0], 1: shared},
        "refused 'mxnet.optimizer.adam.Adam'": ({}, instance("mxnet.optimizer.adam.Adam", {})),
        "refused 'pathlib.(_local.)?PosixPath'|refused 'pathlib": {0: Path("x")},
        "refused 'numpy.ndarray'|refused 'numpy.*_reconstruct'": {0: np.ones(3)},
    }.items():
        with pytest.raises(ValueError, match=reason):
            decode(pickle.dumps(content))


# ---------------------------------------------------------------------------------------------------- hostile programs


def attack(program: bytes) -> bytes:
    return b"\x80\x04" + program + b"."


GLOBALS = b"\x8c\x08builtins\x94\x8c\x09bytearray\x94"  # memo slots 0 and 1
HALF_MEGABYTE = b"X" + struct.pack("<I", 500_000) + b"a" * 500_000
HOSTILE: dict[str, tuple[str, bytes]] = {
    "system": ("refused 'posix.system'", b"cposix\nsystem\n(\x8c\x01xtR"),
    "system by stack": ("refused 'os.system'", b"\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R"),
    "getattr": ("it holds a builtins.getattr", b"cbuiltins\ngetattr\n"),
    "reconstructor": ("it holds a copyreg._reconstructor", b"ccopyreg\n_reconstructor\n"),
    "instance": ("refused opcode INST", b"(iposix\nsystem\n"),
    "object": ("refused opcode OBJ", b"(o"),
    "persistent": ("refused opcode PERSID", b"Px\n"),
    "extension": ("refused opcode EXT1", b"\x82\x01"),
    "buffer": ("refused opcode NEXT_BUFFER", b"\x97"),
    "unknown": ("refused opcode 0xff", b"\xff"),
    "protocol again": ("refused opcode PROTO", b"\x80\x04"),
    "trillion": ("refused a call of bytearray", GLOBALS + b"\x93\x8a\x06\x00\x10\xa5\xd4\xe8\x00\x85R"),
    "codec": ("refused a call of encode", b"c_codecs\nencode\n\x8c\x01x\x8c\x03hex\x86R"),
    "encoding": ("refused a call of bytearray", GLOBALS + b"\x93\x8c\x01x\x8c\x04idna\x86R"),
    "called list": ("refused a call of None", b"]]R"),
    "called array": ("refused a call of array", b"cmxnet.ndarray.ndarray\nNDArray\nK\x05\x85R"),
    "new array": ("refused a new object of array", b"cmxnet.ndarray.ndarray\nNDArray\n)\x81"),
    "dtype": ("refused a call of dtype", b"cnumpy\ndtype\n\x8c\x02O8\x89\x88\x87R"),
    "built dict": ("refused to build a dict", b"}}b"),
    "built twice": ("refused to build a AdaGrad", b"cmxnet.optimizer.adagrad\nAdaGrad\n)\x81}b}b"),
    "memo": ("memo slot 2147483647 out of sequence", b"}r\xff\xff\xff\x7f"),
    "empty memo": ("memo slot 4294967295 is empty", b"j\xff\xff\xff\xff"),
    "frame": ("truncated: it ends before its frame", b"\x95" + b"\xff" * 8),
    "text": ("truncated: 9223372036854775807 bytes", b"\x8d" + struct.pack("<Q", 2**63 - 1)),
    "bytes": ("truncated: 18446744073709551615 bytes", b"\x8e" + b"\xff" * 8),
    "byte array": ("truncated: 1099511627776 bytes", b"\x96" + struct.pack("<Q", 2**40)),
    "integer": ("an integer of 255 bytes", b"\x8a\xff" + b"\xff" * 255),
    "long integer": ("refused opcode LONG4", b"\x8b\xff\xff\xff\x7f"),
    "not UTF-8": ("codec", b"\x8c\x01\xff"),
    "no newline": ("truncated|refused", b"c" + b"x" * 1000),
    "underflow": ("an opcode lacks its operand", b"R"),
    "under a mark": ("an opcode lacks its operand", b"}((a"),
    "no mark": ("an opcode lacks its mark", b"}u"),
    "odd items": ("sets 0.5 items", b"}(K\x00u"),
    "items of a list": ("of a list", b"]K\x00Ns"),
    "appends to a dict": ("appends to a dict", b"}Na"),
    "key": ("a key of type tuple", b"}" + b")\x85Ns"),
    "key twice": ("a key occurs twice", b"}K\x00NsK\x00Ns"),
    "unnamed": ("whose name is not text", b"K\x00K\x00\x93"),
    "two": ("left over", b"}}"),
    "open mark": ("left over", b"(}"),
    "nothing": ("left over", b""),
    "after the end": ("left over", b"}.}"),
    "list in itself": ("two states share", b"}K\x00]\x94h\x00as"),
    "many dicts": ("more objects", b"}" * 100_000),
    "many marks": ("more objects", b"(" * 100_000),
    "many byte strings": ("more objects", b"C\x00" * 50_000),
    "many tuples": ("more objects", b"}K\x00)" + b"\x85" * 100_000 + b"s"),
    "deep tuple": (
        "neither an array nor",
        b"}X" + struct.pack("<I", 10_000) + b"a" * 10_000 + b"NsK\x00)" + b"\x85" * 1000 + b"s",
    ),
    "many memo slots": ("holds a NoneType", b"N" + b"\x94" * 100_000),
    "many Nones": ("left over", b"N" * 100_000),
    "many classes of long names": (
        "refused 'mmm",
        b"\x8c\xff" + b"m" * 255 + b"\x94\x8c\x01n\x94" + b"h\x00h\x01\x93" * 20_000,
    ),
    "many calls": ("more objects", GLOBALS + b"h\x00h\x01\x93" * 20_000),
    "same text again": (
        "two arrays share their bytes",
        GLOBALS + b"\x93\x94" + HALF_MEGABYTE + b"\x94\x8c\x07latin-1\x94h\x03h\x04\x86\x94" + b"h\x02h\x05R" * 1000,
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_are_refused_within_their_size(name: str) -> None:
    reason, program = HOSTILE[name]
    data = attack(program)
    decode_or_refuse(data)  # the imports and caches of a first call are not the program's
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=reason):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < 50 * len(data) + 100_000
    finally:
        tracemalloc.stop()


def test_shared_containers_do_not_multiply() -> None:
    program = b")\x94"
    for slot in range(8):  # each tuple holds the one before twice
        program += b"h" + bytes([slot]) + b"\x86\x94"
    with pytest.raises(ValueError, match="two states share"):
        decode(attack(b"}K\x00" + program + b"s"))


def test_no_code_runs(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    for protocol in (2, 3, 4, 5):
        with pytest.raises(ValueError, match="refused"):
            decode(pickle.dumps({0: Attack()}, protocol))
    assert not (tmp_path / "ran").exists()


def test_memory_of_a_real_file_is_its_size() -> None:
    arrays = [NDARRAY(saved(np.ones(100_000, np.float32))) for _ in range(10)]
    for protocol, copies in ((2, 2.6), (4, 1.1), (5, 1.1)):  # in protocol 2 bytes are text, and are made bytes first
        data = pickle.dumps(dict(enumerate(arrays)), protocol)
        tracemalloc.start()
        try:
            decode(data)
            assert tracemalloc.get_traced_memory()[1] < copies * len(data)
        finally:
            tracemalloc.stop()


def test_own_files_are_told_apart_from_pickles() -> None:
    lengths = set()
    for size in range(1200):
        data = checkpoint.encode({"x" * size: None}, None)
        assert not is_mxnet_states(data)
        lengths.add(data[:2])
    assert {b"\x80\x02", b"\x80\x03", b"\x80\x04"} <= lengths  # header lengths that look like a pickle's first bytes
    assert not any(map(is_mxnet_states, (b"", b"\x80", b"\x80\x01}.", b"\x80\x06}.", b"PK\x03\x04")))
    assert all(map(is_mxnet_states, (b"\x80\x02}.", b"(dp0\n.")))


def test_a_fractional_step_of_which_the_file_holds_a_rounded_multiple(mxnet: Any) -> None:
    step = 1.1
    count = 0.0
    k = 0
    while int(count / step) == k:
        count, k = count + step, k + 1
    schedule = scheduler("Factor", step=step, count=count, base_lr=0.4 * 0.5**k)
    read = read_optimizer(adagrad(num_update=k * 2 + 2, lr=0.4, lr_scheduler=schedule))
    assert read.scheduler[1]["base_lr"] == 0.4


def test_a_polynomial_that_ends_with_a_jump(mxnet: Any) -> None:
    schedule = scheduler("Poly", power=0, max_update=3)
    assert read_optimizer(adagrad(num_update=3, lr=None, lr_scheduler=schedule)).scheduler[1]["pwr"] == 0


def test_a_schedule_that_decayed_before_its_step_was_over(mxnet: Any) -> None:
    schedule = scheduler("Factor", step=3, count=3)
    with pytest.raises(ValueError, match="count 3 at num_update 3"):
        read_optimizer(adagrad(num_update=3, lr=0.4, lr_scheduler=schedule))
    assert read_optimizer(adagrad(num_update=4, lr=0.4, lr_scheduler=schedule)).scheduler[1]["base_lr"] == 0.4


def test_an_array_built_twice(mxnet: Any) -> None:
    data = pickletools.optimize(pickle.dumps({0: NDARRAY(saved(np.zeros(2, np.float32)))}, 3))
    state = data[data.index(b"}X\x06\x00\x00\x00handle") : -2]
    with pytest.raises(ValueError, match="refused to build a Array"):
        decode(data[:-2] + state + b"s.")
