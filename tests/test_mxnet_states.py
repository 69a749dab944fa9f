"""MXNet's state files: real ones decode bit for bit, and which optimizers and schedules are read."""

from __future__ import annotations

import collections
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adagrad import AdaGrad, checkpoint, get_updater
from adagrad.lr_scheduler import FactorScheduler
from adagrad.mxnet_states import MXNetOptimizer, decode, is_mxnet_states
from mxnet_files import FILES, NDARRAY, adagrad, instance, read_optimizer, saved

pytestmark = pytest.mark.usefixtures("mxnet")

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


# -------------------------------------------------------------------------------------------- what else a file may hold


def test_own_files_are_told_apart_from_pickles() -> None:
    lengths = set()
    for size in range(1200):
        data = checkpoint.encode({"x" * size: None}, None)
        assert not is_mxnet_states(data)
        lengths.add(data[:2])
    assert {b"\x80\x02", b"\x80\x03", b"\x80\x04"} <= lengths  # header lengths that look like a pickle's first bytes
    assert not any(map(is_mxnet_states, (b"", b"\x80", b"\x80\x01}.", b"\x80\x06}.", b"PK\x03\x04")))
    assert all(map(is_mxnet_states, (b"\x80\x02}.", b"(dp0\n.")))


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
        "refused 'pathlib": {0: Path("x")},
        "refused 'numpy.ndarray'|refused 'numpy.*(_reconstruct|_frombuffer)'": {0: np.ones(3)},
    }.items():
        with pytest.raises(ValueError, match=reason):
            decode(pickle.dumps(content))


# ----------------------------------------------------------------------------------------------------------- optimizers


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


def test_a_clip_of_zero_is_not_continued() -> None:
    """MXNet takes it for "no gradients" where they are dense, for "no clipping" where they are sparse."""
    data = pickle.dumps(({}, adagrad(clip_gradient=0.0)))
    with pytest.raises(ValueError, match="clip_gradient=0: must be None or > 0: with 0, MXNet sets dense gradients"):
        get_updater(AdaGrad()).set_states(data)
    get_updater(AdaGrad()).set_states(pickle.dumps(({}, adagrad(clip_gradient=1))))


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


# ------------------------------------------------------------------------------------------------------------ schedules


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


@pytest.mark.parametrize("kind", ["Factor", "MultiFactor", "Poly", "Cosine"])
def test_schedules_before_the_first_update_are_read(kind: str) -> None:
    """None has got anywhere yet, which is no further than the optimizer."""
    start = {"Factor": {"count": 0}, "MultiFactor": {"count": 0, "cur_step_ind": 0}}.get(kind, {})
    found = read_optimizer(adagrad(lr=None, num_update=0, lr_scheduler=scheduler(kind, base_lr=0.4, **start)))
    assert isinstance(found.scheduler, tuple)
    assert found.scheduler[1]["base_lr"] == 0.4


def test_steps_of_a_schedule_may_be_floats() -> None:
    changes = {"step": 1.5, "count": 3.0, "base_lr": 0.1}
    found = read_optimizer(adagrad(lr=None, num_update=4, lr_scheduler=scheduler("Factor", **changes)))
    assert (found.scheduler[1]["step"], found.scheduler[1]["base_lr"]) == (1.5, 0.4)
    changes = {"step": [1.5, 2.5, 9.0]}
    found = read_optimizer(adagrad(lr=None, num_update=4, lr_scheduler=scheduler("MultiFactor", **changes)))
    assert found.scheduler[1]["step"] == [1.5, 2.5, 9.0]


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
        ("factor=1.5: must be <= 1", "Factor", {"factor": 1.5}),
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


@pytest.mark.parametrize(
    ("reason", "kind", "changes"),
    [
        ("base_lr=0.3: its schedule gives 0.2 at num_update 3", "Factor", {"base_lr": 0.3}),
        ("base_lr=0.4: its schedule gives 0.1", "MultiFactor", {"base_lr": 0.4}),
        ("base_lr=0.1: its schedule gives 0.0", "Poly", {"base_lr": 0.1, "max_update": 2}),
        ("base_lr=0.1: .* 0.1 at num_update 3 and has got to 4", "Factor", {"count": 4, "base_lr": 0.1}),
    ],
)
def test_a_schedule_that_something_else_changed_is_left_out_but_the_states_are_read(
    reason: str, kind: str, changes: dict[str, Any]
) -> None:
    """As after ``scheduler.base_lr = 0.3`` in MXNet, or after calling it for later updates, for a plot."""
    optimizer = adagrad(lr=None, lr_scheduler=scheduler(kind, **changes))
    updater = get_updater(AdaGrad(None, lr_scheduler=FactorScheduler(7, base_lr=0.125)))
    here = updater.optimizer.lr_scheduler
    with pytest.warns(UserWarning, match=f"{kind}Scheduler.{reason}.*something else has changed it.*not read"):
        updater.set_states(pickle.dumps(({0: NDARRAY(saved(np.ones(3, np.float32)))}, optimizer)))
    assert updater.states[0].tolist() == [1, 1, 1]
    assert updater.optimizer.num_update == 3
    assert updater.optimizer.lr_scheduler is here


def test_a_fractional_step_of_which_the_file_holds_a_rounded_multiple(mxnet: Any) -> None:
    step = 1.1
    count = 0.0
    k = 0
    while int(count / step) == k:
        count, k = count + step, k + 1
    schedule = scheduler("Factor", step=step, count=count, base_lr=0.4 * 0.5**k)
    read = read_optimizer(adagrad(num_update=k * 2 + 2, lr=0.4, lr_scheduler=schedule))
    assert read.scheduler[1]["base_lr"] == 0.4


@pytest.mark.parametrize("num_update", [3, 9])
def test_a_polynomial_that_never_ends(num_update: int, mxnet: Any) -> None:
    schedule = scheduler("Poly", power=0, max_update=3)
    assert read_optimizer(adagrad(num_update=num_update, lr=None, lr_scheduler=schedule)).scheduler[1]["pwr"] == 0


def test_a_schedule_that_decayed_before_its_step_was_over(mxnet: Any) -> None:
    schedule = scheduler("Factor", step=3, count=3)
    with pytest.warns(UserWarning, match="at num_update 3 and has got to 3"):
        assert read_optimizer(adagrad(num_update=3, lr=0.4, lr_scheduler=schedule)).scheduler == "custom"
    assert read_optimizer(adagrad(num_update=4, lr=0.4, lr_scheduler=schedule)).scheduler[1]["base_lr"] == 0.4
