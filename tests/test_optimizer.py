"""The API contract of Optimizer, AdaGrad and GroupAdaGrad: arguments, states, configurations, copies, the registry."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import adagrad
from adagrad import AdaGrad, GroupAdaGrad, Optimizer
from adagrad.lr_scheduler import FactorScheduler
from support import BFLOAT16, assert_same_bits
from training import CLASSES

# ------------------------------------------------------------------------------------------------------------ arguments


def test_defaults() -> None:
    optimizer = AdaGrad()
    assert vars(optimizer).items() >= {
        "lr": 0.01, "epsilon": 1e-6, "use_fused_step": True, "initial_accumulator_value": 0.0, "rescale_grad": 1.0,
        "wd": 0.0, "clip_gradient": None, "lr_scheduler": None, "begin_num_update": 0, "num_update": 0,
        "multi_precision": False, "aggregate_num": 1, "param_dict": {}, "idx2name": {}, "lr_mult": {}, "wd_mult": {},
    }.items()  # fmt: skip
    assert optimizer.learning_rate == 0.01
    assert not optimizer.row_wise
    assert GroupAdaGrad().row_wise
    base = Optimizer()
    assert base.learning_rate == 0.01
    assert base.use_fused_step is False


@pytest.mark.parametrize("klass", CLASSES)
def test_positional_arguments_are_mxnets(klass: type[AdaGrad]) -> None:
    optimizer = klass(0.5, 1e-3, False)
    assert (optimizer.learning_rate, optimizer.epsilon, optimizer.use_fused_step) == (0.5, 1e-3, False)
    with pytest.raises(TypeError):
        klass(0.5, 1e-3, False, 0.1)  # type: ignore[misc]
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentum'"):
        klass(momentum=0.9)


@pytest.mark.parametrize("aggregate_num", [None, 1, 7, math.inf, np.inf])
def test_aggregate_num(aggregate_num: Any) -> None:
    assert AdaGrad(aggregate_num=aggregate_num).aggregate_num == (1 if aggregate_num is None else aggregate_num)


def test_names_of_indices_are_strings() -> None:
    with pytest.raises(TypeError, match=r"param_idx2name\[0\]=5: must be a string"):
        AdaGrad(param_idx2name={0: 5})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("name", "here"),
    [("eps", "epsilon"), ("lr", "learning_rate"), ("weight_decay", "wd"), ("row_wise", "another class, GroupAdaGrad")],
)
def test_names_of_other_frameworks(name: str, here: str) -> None:
    with pytest.raises(TypeError, match=rf"AdaGrad\(\) got an unexpected keyword argument '{name}': here it is {here}"):
        AdaGrad(**{name: 0.1})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"GroupAdaGrad\(\) got an unexpected keyword argument 'nesterov'$"):
        GroupAdaGrad(nesterov=True)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("learning_rat", "learning_rate"),
        ("epsilonn", "epsilon"),
        ("clip_grad", "clip_gradient"),
        ("rescale_gradient", "rescale_grad"),
        ("multiprecision", "multi_precision"),
        ("initial_accumulator", "initial_accumulator_value"),
    ],
)
def test_a_misspelt_name(name: str, meant: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}': did you mean '{meant}'\\?"):
        AdaGrad(**{name: 0.1})  # type: ignore[arg-type]


def test_numpys_booleans_are_booleans() -> None:
    assert AdaGrad(multi_precision=np.True_).multi_precision is True


def test_repr() -> None:
    optimizer = AdaGrad(0.5, wd=0.25)
    optimizer.update(0, np.ones(1), np.ones(1), np.zeros(1))
    assert repr(optimizer) == (
        "AdaGrad(learning_rate=0.5, rescale_grad=1.0, wd=0.25, clip_gradient=None, begin_num_update=0, "
        "multi_precision=False, epsilon=1e-06, initial_accumulator_value=0.0, epsilon_inside=False, "
        "decoupled_decay=False, num_update=1)"
    )
    assert repr(GroupAdaGrad(None, lr_scheduler=FactorScheduler(3))).startswith(
        "GroupAdaGrad(lr_scheduler=FactorScheduler(step=3, factor=1.0,"
    )


# --------------------------------------------------------------------------------------------------------------- states


def test_states() -> None:
    optimizer = AdaGrad(initial_accumulator_value=0.25, multi_precision=True)
    for dtype, computing in [("f2", "f4"), (BFLOAT16, "f4"), ("f4", "f4"), ("f8", "f8"), (">f4", "f4"), (">f8", "f8")]:
        weight = np.ones((3, 2), dtype)
        history = optimizer.create_state(0, weight)
        assert (history.dtype, history.shape) == (np.dtype(computing), (3, 2))
        assert history.dtype.isnative
        assert (history == 0.25).all()
        state = optimizer.create_state_multi_precision(0, weight)
        assert isinstance(state, tuple) == (weight.itemsize == 2)
        if isinstance(state, tuple):
            assert [part.dtype for part in state] == [np.float32, np.float32]
            assert_same_bits(state[0], np.ones((3, 2), np.float32))
            assert not np.shares_memory(state[0], weight)
    assert GroupAdaGrad().create_state(0, np.ones((4, 2, 3))).shape == (4, 1, 1)
    assert GroupAdaGrad().create_state(0, np.ones(4)).shape == (4,)
    assert AdaGrad().create_state(0, np.ones(())).shape == ()
    assert AdaGrad().create_state(0, np.ones((0, 3))).shape == (0, 3)
    assert Optimizer().create_state(0, np.ones(3)) is None


def test_history_lies_as_the_weight_does() -> None:
    """So that a step goes through both in the same order."""
    for weight in (np.ones((5, 7), order="F"), np.ones((2, 3, 4)).transpose(2, 0, 1)):
        assert AdaGrad().create_state(0, weight).strides == weight.strides


def test_an_initial_history_fits_its_dtype() -> None:
    optimizer = AdaGrad(initial_accumulator_value=1e300)
    assert optimizer.create_state(0, np.ones(2)).tolist() == [1e300] * 2
    most = float(np.finfo(np.float32).max)
    assert AdaGrad(initial_accumulator_value=most).create_state(0, np.ones(1, np.float32))[0] == most
    with pytest.raises(ValueError, match=r"initial_accumulator_value=1e\+300: must be finite in float32"):
        optimizer.create_state(0, np.ones(2, np.float32))


def test_the_master_copy_of_a_parameter_has_no_autograd_history() -> None:
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    master, history = AdaGrad(multi_precision=True).create_state_multi_precision(0, weight)
    assert not master.requires_grad
    assert not history.requires_grad


@pytest.mark.parametrize("fused", [True, False])
def test_row_wise_history_of_a_weight_that_is_not_c_contiguous(fused: bool) -> None:
    optimizer, weight = GroupAdaGrad(use_fused_step=fused), np.ones((3, 4), np.float32).T
    state = optimizer.create_state(0, weight)
    assert state.shape == (4, 1)
    optimizer.update(0, weight, np.ones((4, 3), np.float32), state)
    assert (state == 1).all()


# ------------------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_update", -1), ("num_update", 1.5), ("num_update", 10**400), ("index_update_count", {0: -1}), ("lr", -1.0),
     ("lr_mult", {0: -1.0}), ("idx2name", {0: {}}), ("wd", math.inf), ("epsilon", "x"), ("multi_precision", 1),
     ("lr_scheduler", ["FactorScheduler", {"step": 0}])],
    ids=str,
)  # fmt: skip
def test_hyper_parameters_of_a_file_are_checked(name: str, value: Any) -> None:
    optimizer, here = AdaGrad(0.5), AdaGrad(0.1)
    before = here.config()
    with pytest.raises(ValueError, match=name.replace("index_update_", "").replace("lr_scheduler", "step|base_lr")):
        here.set_config({**optimizer.config(), name: value})
    assert here.config() == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("wd", -1.0), ("rescale_grad", math.nan), ("lr", "x"), ("lr_mult", {0: "2"}), ("num_update", -5)],
)
def test_what_could_not_be_loaded_is_not_saved(name: str, value: Any) -> None:
    optimizer = AdaGrad()
    setattr(optimizer, name, value)
    with pytest.raises(ValueError, match=f"optimizer AdaGrad: cannot be saved: {name}"):
        optimizer.config()


def test_a_config_is_a_copy() -> None:
    optimizer, weight = AdaGrad(wd=0.5, param_idx2name={0: "w"}), np.ones(2, np.float32)
    optimizer.set_lr_mult({0: 0.5})
    optimizer.set_wd_mult({0: 0.5})
    config = optimizer.config()
    before = copy.deepcopy(config)
    optimizer.update(0, weight, weight.copy(), optimizer.create_state(0, weight))
    optimizer.lr_mult[0] = optimizer.wd_mult[0] = 2.0
    optimizer.idx2name[0] = "v"
    assert config == before


# --------------------------------------------------------------------------------------------------------------- copies


def test_repeated_copies_of_an_optimizer_are_independent() -> None:
    optimizer = AdaGrad(0.1)
    other = copy.deepcopy(optimizer)
    other.update(0, np.zeros(2), np.ones(2), np.zeros(2))
    assert (optimizer.num_update, other.num_update) == (0, 1)


def test_copies_leave_param_dict_behind_as_in_mxnet() -> None:
    parameter = SimpleNamespace(lr_mult=0.5, wd_mult=1.0, data=np.ones(1_000_000))
    optimizer = AdaGrad(0.5, param_dict={0: parameter})
    optimizer.set_lr_mult({1: 0.25})
    assert len(pickle.dumps(optimizer)) < 10_000
    for other in (copy.copy(optimizer), copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert [other._get_lr(0), other._get_lr(1)] == [0.5, 0.125]
        assert other.param_dict == {}
    assert optimizer._get_lr(0) == 0.25


def test_copies_keep_slots() -> None:
    optimizer = Slotted(0.5)
    optimizer.extra = 5
    for other in (copy.copy(optimizer), copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (other.extra, other.learning_rate, other.param_dict) == (5, 0.5, {})


class Slotted(AdaGrad):
    __slots__ = ("extra",)

    extra: int


class _Restored(AdaGrad):
    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.is_restored = True


def test_a_subclass_that_restores_its_state_as_in_mxnet() -> None:
    optimizer = _Restored(0.5, param_dict={0: SimpleNamespace(lr_mult=0.5, wd_mult=1.0)})
    for other in (copy.copy(optimizer), copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (other.is_restored, other.learning_rate, other.param_dict) == (True, 0.5, {})
    other = AdaGrad.__new__(AdaGrad)
    other.__setstate__({name: value for name, value in vars(AdaGrad(0.25)).items() if name != "param_dict"})
    assert (other.learning_rate, other.param_dict) == (0.25, {})


def test_a_base_class_beside_the_optimizer_is_initialised() -> None:
    class Tagged:
        def __init__(self) -> None:
            self.tag = "new"

    class Both(AdaGrad, Tagged):
        pass

    assert (Both(0.5).tag, Both(0.5).learning_rate) == ("new", 0.5)


def test_copies_leave_unset_slots_unset() -> None:
    made = copy.copy(_Slots())
    assert not hasattr(made, "extra")
    made = copy.deepcopy(_Slots())
    assert not hasattr(made, "extra")


class _Slots(AdaGrad):
    __slots__ = ("extra",)


# --------------------------------------------------------------------------------------------------------- the registry


def test_create() -> None:
    for name, klass in [
        ("adagrad", AdaGrad),
        ("AdaGrad", AdaGrad),
        ("ADAGRAD", AdaGrad),
        ("GroupAdaGrad", GroupAdaGrad),
    ]:
        optimizer = adagrad.create(name, learning_rate=0.5, epsilon=0.1)
        assert type(optimizer) is klass
        assert (optimizer.learning_rate, optimizer.epsilon) == (0.5, 0.1)
    assert Optimizer.create_optimizer is adagrad.create
    with pytest.raises(ValueError, match=r"name='sgd': no such optimizer; registered: .*adagrad.*groupadagrad"):
        adagrad.create("sgd")
    with pytest.raises(TypeError, match="name=3: must be a string"):
        adagrad.create(3)  # type: ignore[arg-type]


def test_register(registry: dict[str, type]) -> None:
    @adagrad.register
    class Mine(Optimizer):
        pass

    assert registry["mine"] is Mine
    assert type(adagrad.create("MINE", wd=0.5)) is Mine
    adagrad.register(Mine)  # again: no warning

    def cell() -> type[Optimizer]:  # as a cell of a notebook that is run again
        class Mine(Optimizer):
            pass

        return Mine

    for _ in range(2):  # another class of the name, then one of the same qualified name
        again = cell()
        with pytest.warns(UserWarning, match=r"Mine replaces .*Mine"):
            adagrad.register(again)
        assert registry["mine"] is again
    with pytest.raises(TypeError, match="klass=3: must be a class"):
        adagrad.register(3)  # type: ignore[type-var]


def test_classes_are_not_kept() -> None:
    def use() -> weakref.ref[type]:
        class Local(AdaGrad):
            pass

        optimizer, weight = Local(), np.ones(1)
        adagrad.get_updater(optimizer)(0, np.ones(1), weight)
        return weakref.ref(Local)

    local = use()
    gc.collect()
    assert local() is None
