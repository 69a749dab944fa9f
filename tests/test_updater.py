"""The updater: states by index, aggregation, all or nothing over a list, checkpoints."""

from __future__ import annotations

import copy
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adagrad import AdaGrad, GroupAdaGrad, Optimizer, RowSparse, Updater, checkpoint, get_updater, kernels, rule
from adagrad.kernels import cpu_dense, dense_lists, expressions, general_path, outcomes, row_lists
from adagrad.lr_scheduler import (
    CosineScheduler,
    FactorScheduler,
    LRScheduler,
    MultiFactorScheduler,
    PolyScheduler,
)
from adagrad.saved_schedules import MOST_DECAYS
from support import BFLOAT16, assert_same_bits, normal

AGGREGATES = pytest.mark.parametrize("aggregate_num", [1, 2, 3, 100, np.inf, None])
"""None: all at once, as of the library's own class; else of a subclass."""


class Plain(AdaGrad):
    """A user's class: an updater heeds its aggregate_num."""


def make_weights() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [
        normal(rng, shape, dtype)
        for shape, dtype in [((4, 3), "f4"), ((5,), "f8"), ((4, 2), "f2"), ((3, 3), "f4"), ((), "f4")]
    ]


def make_grads(t: int, weights: list[np.ndarray], rows: bool = True) -> list[Any]:
    rng = np.random.default_rng(100 + t)
    grads: list[Any] = [normal(rng, w.shape, w.dtype) for w in weights]
    if rows:
        grads[3] = RowSparse(normal(rng, (4, 3), "f4"), rng.integers(0, 3, 4), (3, 3))
    return grads


INDICES: list[Any] = [0, "one", 2, 3, "four"]


def run(updater: Updater, weights: list[np.ndarray], steps: range, *, together: bool = True) -> None:
    for t in steps:
        grads = make_grads(t, weights)
        if together:
            updater(INDICES, grads, weights)
        else:
            for index, grad, weight in zip(INDICES, grads, weights, strict=True):
                updater(index, grad, weight)


def optimizer(**options: Any) -> AdaGrad:
    schedule = options.pop("lr_scheduler", None) or FactorScheduler(step=2, factor=0.5, base_lr=0.3)
    kind = AdaGrad if options.get("aggregate_num") is None else Plain
    made = kind(None, lr_scheduler=schedule, wd=0.01, multi_precision=True, **options)
    made.set_lr_mult({0: 0.5, "one": 2.0})
    return made


def assert_same_states(one: dict[Any, Any], two: dict[Any, Any]) -> None:
    assert [(type(k), k) for k in one] == [(type(k), k) for k in two]
    for index, state in one.items():
        pairs = zip(state, two[index], strict=True) if isinstance(state, tuple) else [(state, two[index])]
        for a, b in pairs:
            assert_same_bits(a, b, f"state {index!r}")


# ----------------------------------------------------------------------------------------------------------- updating


@AGGREGATES
@pytest.mark.parametrize("together", [True, False], ids=["lists", "one by one"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "expression"])
def test_aggregation_changes_nothing(aggregate_num: float | None, together: bool, fused: bool) -> None:
    plain, weights = optimizer(), make_weights()
    states = [plain.create_state_multi_precision(i, w) for i, w in zip(INDICES, weights, strict=True)]
    for t in range(4):
        plain.update_multi_precision(INDICES, weights, make_grads(t, weights), states)
    updater, others = get_updater(optimizer(aggregate_num=aggregate_num, use_fused_step=fused)), make_weights()
    run(updater, others, range(4), together=together)
    for one, two in zip(weights, others, strict=True):
        assert_same_bits(one, two)
    assert_same_states(dict(zip(INDICES, states, strict=True)), updater.states)
    assert updater.optimizer.num_update == 4


class Counting(AdaGrad):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sizes: list[int] = []

    def update_multi_precision(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        self.sizes.append(len(indices))
        super().update_multi_precision(indices, weights, grads, states)


@pytest.mark.parametrize(
    ("aggregate_num", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (4, [4, 1]), (5, [5]), (np.inf, [5])]
)
def test_how_many_weights_go_into_one_step(aggregate_num: float, sizes: list[int]) -> None:
    counting, weights = Counting(aggregate_num=aggregate_num), make_weights()
    get_updater(counting)(INDICES, make_grads(0, weights), weights)
    assert counting.sizes == sizes
    get_updater(counting)([], [], [])
    assert counting._index_update_count == dict.fromkeys(INDICES, 1)


def patched() -> AdaGrad:
    optimizer = AdaGrad()
    optimizer.step = optimizer.step  # type: ignore[method-assign] # a function of the user's
    return optimizer


def scheduled(scheduler: Any) -> AdaGrad:
    return AdaGrad(learning_rate=None, lr_scheduler=scheduler)


@pytest.mark.parametrize(
    ("make", "is_together"),
    [
        (AdaGrad, True),
        (GroupAdaGrad, True),
        (lambda: scheduled(FactorScheduler(1)), True),
        (lambda: scheduled(lambda num_update: 0.1), False),
        (Plain, False),
        (patched, False),
    ],
)
def test_all_weights_go_into_one_step_where_it_makes_no_difference(
    make: Any, is_together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    update = kernels.update

    def counting(weights: Any, *others: Any, **options: Any) -> None:
        sizes.append(len(weights))
        update(weights, *others, **options)

    monkeypatch.setattr(kernels, "update", counting)
    given, weights = make(), make_weights()[:4]
    get_updater(given)(INDICES[:4], make_grads(0, weights), weights)
    assert sizes == ([4] if is_together else [1] * 4)
    assert given._index_update_count == dict.fromkeys(INDICES[:4], 1)


def test_the_order_of_arguments_is_mxnets() -> None:
    """Index, gradient, weight."""
    weight, grad = np.ones(2, np.float32), np.full(2, 3, np.float32)
    get_updater(AdaGrad(0.5))(0, grad, weight)
    assert (grad == 3).all()
    assert (weight < 1).all()


def test_bytes_as_indices() -> None:
    updater, weight = get_updater(AdaGrad()), np.ones(2)
    updater(b"name", np.ones(2), weight)
    updater("name", np.ones(2), weight)
    updater([b"name"], [np.ones(2)], [weight])
    assert list(updater.states) == ["name"]
    assert updater.optimizer._index_update_count == {"name": 3}


def test_integers_and_strings_are_different_indices() -> None:
    updater = get_updater(AdaGrad())
    for index in (0, "0", 1):
        updater(index, np.ones(2), np.ones(2))
    assert [(type(index), index) for index in updater.states] == [(int, 0), (str, "0"), (int, 1)]


def test_states_are_made_once_and_kept() -> None:
    updater, weight = get_updater(AdaGrad(initial_accumulator_value=0.5)), np.ones(2)
    updater(0, np.ones(2), weight)
    state = updater.states[0]
    updater(0, np.ones(2), weight)
    assert updater.states[0] is state
    assert (state == 2.5).all()


BAD: dict[str, tuple[Any, type[Exception]]] = {
    "shape": (lambda u, g, w, i: g.__setitem__(i, np.ones(77, np.float32)), ValueError),
    "dtype": (lambda u, g, w, i: g.__setitem__(i, np.ones(w[i].shape, np.int8)), TypeError),
    "no gradient": (lambda u, g, w, i: g.__setitem__(i, None), TypeError),
    "no weight": (lambda u, g, w, i: w.__setitem__(i, [1.0]), TypeError),
    "read-only": (lambda u, g, w, i: w[i].setflags(write=False), ValueError),
    "same weight twice": (lambda u, g, w, i: (w.__setitem__(i, w[1]), g.__setitem__(i, g[1])), ValueError),
    "gradient in another weight": (
        lambda u, g, w, i: g.__setitem__(i, w[3 if i == 0 else 0][: len(w[i])] if w[i].ndim else w[0][0, 0, ...]),
        ValueError,
    ),
    "row": (
        lambda u, g, w, i: (
            w.__setitem__(i, np.ones((4, 3), np.float32)),
            g.__setitem__(i, RowSparse(np.ones((1, 3), np.float32), np.array([4]), (4, 3))),
        ),
        IndexError,
    ),
    "lr_mult": (
        lambda u, g, w, i: setattr(
            u.optimizer, "param_dict", {INDICES[i]: type("P", (), {"lr_mult": -1.0, "wd_mult": 1.0})}
        ),
        ValueError,
    ),
    "wd": (lambda u, g, w, i: setattr(u.optimizer, "wd", math.nan), ValueError),
    "schedule": (
        lambda u, g, w, i: setattr(u.optimizer, "lr_scheduler", lambda n: math.nan if n > 2 else 0.1),
        ValueError,
    ),
    "length": (lambda u, g, w, i: g.pop(), ValueError),
}


@AGGREGATES
@pytest.mark.parametrize("at", [0, 4])
@pytest.mark.parametrize("started", [True, False], ids=["with states", "first call"])
@pytest.mark.parametrize(("spoil", "error"), BAD.values(), ids=BAD)
def test_all_or_nothing_over_a_list(
    spoil: Any, error: type[Exception], started: bool, at: int, aggregate_num: float | None
) -> None:
    updater, weights = get_updater(optimizer(aggregate_num=aggregate_num)), make_weights()
    run(updater, weights, range(2 if started else 0))
    if not started and spoil is BAD["schedule"][0]:
        updater.optimizer.begin_num_update = 2
    grads = make_grads(9, weights, rows=False)
    spoil(updater, grads, weights, at)
    if at == 4 and started and spoil is BAD["row"][0]:
        updater.states["four"] = np.zeros((4, 3), np.float32)

    def everything() -> Any:
        states = {
            i: [part.tobytes() for part in (s if isinstance(s, tuple) else (s,))] for i, s in updater.states.items()
        }
        arrays = [w.tobytes() if isinstance(w, np.ndarray) else w for w in weights]
        return states, arrays, dict(updater.optimizer._index_update_count), updater.optimizer.num_update

    before = everything()
    with pytest.raises(error):
        updater(INDICES, grads, weights)
    assert everything() == before


def test_an_optimizer_of_ones_own() -> None:
    class Descent(Optimizer):
        def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
            for index, weight, grad in zip(indices, weights, grads, strict=True):
                self._update_count(index)
                weight -= self._get_lr(index) * grad

    weights = [np.ones(2), np.ones(3)]
    updater = get_updater(Descent(learning_rate=0.5))
    updater([0, 1], [np.ones(2), np.ones(3)], weights)
    assert updater.states == {0: None, 1: None}
    assert all((w == 0.5).all() for w in weights)
    again = get_updater(Descent(learning_rate=0.1))
    again.set_states(updater.get_states(dump_optimizer=True))
    again([0, 1], [np.ones(2), np.ones(3)], weights)
    assert all((w == 0).all() for w in weights)
    assert again.optimizer.num_update == 2


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("through", ["bytes", "file"])
@pytest.mark.parametrize(
    "schedule",
    [
        FactorScheduler(step=2, factor=0.5, base_lr=0.3),
        MultiFactorScheduler([2, 4], 0.5, 0.3, 2, 0.1, "constant"),
        PolyScheduler(8, 0.3, 1.5, 0.01, 2, 0.1),
        CosineScheduler(8, 0.3, 0.01),
    ],
    ids=lambda s: type(s).__name__,
)
def test_training_goes_on_from_a_checkpoint_as_if_nothing_had_happened(
    through: str, schedule: Any, tmp_path: Path
) -> None:
    updater, weights = get_updater(optimizer(lr_scheduler=schedule)), make_weights()
    run(updater, weights, range(3))
    stopped = copy.deepcopy(weights)
    again = get_updater(AdaGrad(0.7, wd=0.5, epsilon=0.1))
    if through == "file":
        updater.save_states(tmp_path / "states", dump_optimizer=True)
        again.load_states(tmp_path / "states")
    else:
        again.set_states(updater.get_states(dump_optimizer=True))
    assert_same_states(updater.states, again.states)
    assert again.optimizer.config() == updater.optimizer.config()
    run(updater, weights, range(3, 7))
    run(again, stopped, range(3, 7))
    for one, two in zip(weights, stopped, strict=True):
        assert_same_bits(one, two)
    assert_same_states(updater.states, again.states)


def test_without_the_optimizer_the_states_alone_are_replaced() -> None:
    updater, weights = get_updater(optimizer()), make_weights()
    run(updater, weights, range(3))
    again = get_updater(AdaGrad(0.7, wd=0.5, multi_precision=True))
    before = again.optimizer.config()
    again.set_states(updater.get_states())
    assert again.optimizer.config() == before
    assert_same_states(updater.states, again.states)


def test_set_states_works_in_place_on_the_same_optimizer() -> None:
    updater, weights = get_updater(optimizer()), make_weights()
    run(updater, weights, range(3))
    data = updater.get_states(dump_optimizer=True)
    run(updater, weights, range(3, 5))
    same = updater.optimizer
    updater.set_states(data)
    assert updater.optimizer is same
    assert same.num_update == 3
    assert same._index_update_count == dict.fromkeys(INDICES, 3)


def test_what_was_loaded_is_not_the_bytes_that_were_given() -> None:
    updater = get_updater(AdaGrad())
    updater(0, np.ones(3), np.ones(3))
    data = bytearray(updater.get_states())
    again = get_updater(AdaGrad())
    again.set_states(data)  # type: ignore[arg-type]
    data[:] = bytes(len(data))
    assert (again.states[0] == 1).all()
    again(0, np.ones(3), np.ones(3))
    assert (updater.states[0] == 1).all()
    again.set_states(memoryview(updater.get_states()))  # type: ignore[arg-type]


def test_a_schedule_of_ones_own_is_kept_and_never_saved() -> None:
    def schedule(n: int) -> float:
        return 1.0 / n

    updater = get_updater(AdaGrad(None, lr_scheduler=schedule))
    updater(0, np.ones(2), np.ones(2))
    data = updater.get_states(dump_optimizer=True)
    other = get_updater(AdaGrad(None, lr_scheduler=lambda n: 2.0 / n))
    kept = other.optimizer.lr_scheduler
    other.set_states(data)
    assert other.optimizer.lr_scheduler is kept
    assert other.optimizer.learning_rate == 2.0
    without = get_updater(AdaGrad(0.5))
    with pytest.warns(UserWarning, match=r"custom scheduler, which no file holds: keeping learning_rate=0.5"):
        without.set_states(data)
    assert without.optimizer.lr_scheduler is None
    assert without.optimizer.learning_rate == 0.5
    for saved in (AdaGrad(None, lr_scheduler=FactorScheduler(1, 0.5)), AdaGrad(0.3)):
        other.set_states(get_updater(saved).get_states(dump_optimizer=True))
        assert other.optimizer.lr_scheduler is kept


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


@pytest.mark.parametrize("changed", ["base_lr", "warmup_final_lr"])
def test_a_schedule_whose_rate_was_lowered_below_its_warm_up_goes_on(changed: str) -> None:
    schedule = CosineScheduler(100, base_lr=0.1, warmup_steps=5, warmup_begin_lr=0.05)
    setattr(schedule, changed, 0.01)
    updater = get_updater(AdaGrad(None, lr_scheduler=schedule))
    again = get_updater(AdaGrad())
    again.set_states(updater.get_states(dump_optimizer=True))
    assert [again.optimizer._lr_at(n) for n in range(120)] == [schedule(n) for n in range(120)]


def test_a_schedule_that_could_not_be_loaded_is_not_saved() -> None:
    schedule = CosineScheduler(100, warmup_steps=5)
    schedule.max_update = 2
    updater = get_updater(AdaGrad(None, lr_scheduler=schedule))
    with pytest.raises(ValueError, match=r"optimizer AdaGrad: cannot be saved: warmup_steps=5: must be < max_update=2"):
        updater.get_states(dump_optimizer=True)
    updater.get_states()


def test_what_is_not_saved() -> None:
    parameters = {0: type("P", (), {"lr_mult": 2.0, "wd_mult": 1.0})}
    updater = get_updater(AdaGrad(0.5, aggregate_num=3, param_dict=parameters))
    updater(0, np.ones(2), np.ones(2))
    again = get_updater(AdaGrad(aggregate_num=7, use_fused_step=False, param_dict={5: 1}))
    again.set_states(updater.get_states(dump_optimizer=True))
    assert again.optimizer.aggregate_num == 7
    assert again.optimizer.use_fused_step is False
    assert again.optimizer.param_dict == {5: 1}
    assert again.optimizer.learning_rate == 0.5


@pytest.mark.parametrize("rows", [2, 4, 7])
@pytest.mark.parametrize("klass", [AdaGrad, GroupAdaGrad])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16], ids=["float32", "float16", "bfloat16"])
def test_resize_rows(rows: int, klass: type[AdaGrad], dtype: Any) -> None:
    """A vocabulary that shrinks or grows: rows that stay keep their state, new ones start as they would have."""
    options: dict[str, Any] = {"initial_accumulator_value": 0.25, "multi_precision": True, "wd": 0.1}
    updater, weight = get_updater(klass(0.1, **options)), normal(np.random.default_rng(1), (4, 3), dtype)
    updater(0, np.ones((4, 3), dtype), weight)
    new_weight = np.concatenate([weight, np.full((5, 3), 2, dtype)])[:rows].copy()
    again = get_updater(klass(0.1, **options))
    again.set_states(updater.get_states(), resize_rows=True)
    fresh = again.optimizer.create_state_multi_precision(0, new_weight)
    expected, kept = fresh if isinstance(fresh, tuple) else (fresh,), min(rows, 4)
    old = updater.states[0] if isinstance(updater.states[0], tuple) else (updater.states[0],)
    for part, whole in zip(expected, old, strict=True):
        part[:kept] = whole[:kept]
    direct = new_weight.copy()
    again(0, np.ones((rows, 3), dtype), new_weight)
    again.optimizer.update_multi_precision(1, direct, np.ones((rows, 3), dtype), fresh)
    assert_same_bits(new_weight, direct)
    assert_same_states({0: again.states[0]}, {0: fresh})
    again(0, np.ones((rows, 3), dtype), new_weight)
    with pytest.raises(ValueError, match="shape"):
        again(0, np.ones((9, 3), dtype), np.ones((9, 3), dtype))


def test_without_resize_rows_another_shape_is_refused() -> None:
    updater = get_updater(AdaGrad())
    updater(0, np.ones((4, 3)), np.ones((4, 3)))
    again = get_updater(AdaGrad())
    again.set_states(updater.get_states())
    weight = np.ones((5, 3))
    with pytest.raises(ValueError, match=r"history in states\[0\]: shape \(4, 3\): must be \(5, 3\)"):
        again(0, np.ones((5, 3)), weight)
    assert (weight == 1).all()
    again(0, np.ones((4, 3)), np.ones((4, 3)))
    filled = get_updater(AdaGrad())
    filled(0, np.ones((5, 3)), np.ones((5, 3)))
    with pytest.raises(ValueError, match=r"states\[0\]: float64 of shape \(4, 3\): must be float64 of shape \(5, 3\)"):
        filled.set_states(updater.get_states())
    assert filled.states[0].shape == (5, 3)
    filled.set_states(updater.get_states(), resize_rows=True)
    with pytest.raises(ValueError, match="shape"):
        filled(0, np.ones((4, 2)), np.ones((4, 2)))  # columns are not rows


def test_states_of_another_kind_are_refused() -> None:
    """A history where the weight wants a master copy too, and the other way round."""
    half, single = np.ones(3, np.float16), np.ones(3, np.float32)
    updater = get_updater(AdaGrad(multi_precision=True))
    updater(0, half.copy(), half)
    updater(1, single.copy(), single)
    data = updater.get_states()
    again = get_updater(AdaGrad(multi_precision=True))
    again.set_states(data)
    for index, weight in ((0, single), (1, half)):
        before = weight.copy()
        with pytest.raises(ValueError, match=rf"states\[{index}\]: .*must be "):
            again(index, np.ones_like(weight), weight)
        assert_same_bits(weight, before)
    again([0, 1], [np.ones_like(half), np.ones_like(single)], [half, single])


class OtherAdaGrad(AdaGrad):
    pass


def test_another_class_is_refused() -> None:
    updater = get_updater(AdaGrad(0.3))
    updater(0, np.ones(2), np.ones(2))
    for optimizer_class in (GroupAdaGrad, OtherAdaGrad):
        other = get_updater(optimizer_class(0.1))
        other(5, np.ones(2), np.ones(2))
        state = other.states[5].copy()
        with pytest.raises(ValueError, match=f"optimizer 'AdaGrad': must be '{optimizer_class.__name__}'"):
            other.set_states(updater.get_states(dump_optimizer=True))
        assert list(other.states) == [5]
        assert_same_bits(other.states[5], state)
        assert other.optimizer.learning_rate == 0.1
        assert other.optimizer.num_update == 1


def test_damaged_bytes_are_refused_and_nothing_changes() -> None:
    updater, weights = get_updater(optimizer()), make_weights()
    run(updater, weights, range(2))
    data = updater.get_states(dump_optimizer=True)
    other, others = get_updater(optimizer(lr_scheduler=PolyScheduler(9, 0.5))), make_weights()
    run(other, others, range(1))
    before, config = copy.deepcopy(other.states), other.optimizer.config()
    flipped = bytearray(data)
    flipped[-5] ^= 1
    cases = [b"", b"abc", data[:7], data[: len(data) // 2], data[:-1], data + b"\0", bytes(flipped), bytes(len(data))]
    for damaged in cases:
        with pytest.raises(ValueError, match=r".") as caught:
            other.set_states(damaged)
        assert len(str(caught.value)) > 10
        assert_same_states(other.states, before)
        assert other.optimizer.config() == config
    for wrong in ("text", None, 3, [data]):
        with pytest.raises(TypeError, match=r"states=.*must be bytes"):
            other.set_states(wrong)  # type: ignore[arg-type]


def test_files(tmp_path: Path) -> None:
    updater, weights = get_updater(optimizer()), make_weights()
    run(updater, weights, range(2))
    path = tmp_path / "states.safetensors"
    path.write_bytes(b"what was there before")
    updater.save_states(path)
    assert path.read_bytes() == updater.get_states()
    assert [each.name for each in tmp_path.iterdir()] == ["states.safetensors"]
    updater.save_states(str(path), True)
    again = get_updater(optimizer())
    again.load_states(str(path))
    assert_same_states(again.states, updater.states)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"states\.safetensors: "):
        again.load_states(path)
    assert_same_states(again.states, updater.states)
    with pytest.raises(FileNotFoundError):
        again.load_states(tmp_path / "none")
    with pytest.raises(OSError, match=r"."):
        updater.save_states(tmp_path / "no" / "folder")


def test_loaded_states_move_to_tensors() -> None:
    updater, weight = get_updater(AdaGrad(0.1, multi_precision=True)), torch.ones(4, 3, dtype=torch.bfloat16)
    updater(0, torch.ones(4, 3, dtype=torch.bfloat16), weight)
    again, copied = get_updater(AdaGrad(0.1, multi_precision=True)), weight.clone()
    again.set_states(updater.get_states())
    for each, w in ((updater, weight), (again, copied)):
        each(0, torch.ones(4, 3, dtype=torch.bfloat16), w)
    assert_same_bits(weight, copied)
    assert all(isinstance(part, torch.Tensor) for part in again.states[0])
    for one, two in zip(updater.states[0], again.states[0], strict=True):
        assert_same_bits(one, two)


def test_loaded_states_are_adopted_once() -> None:
    """From then on they are the updater's own, written to in place."""
    updater, weight = get_updater(AdaGrad()), np.ones(3)
    updater(0, np.ones(3), weight)
    again = get_updater(AdaGrad())
    again.set_states(updater.get_states(), resize_rows=True)
    again(0, np.ones(3), weight)
    state = again.states[0]
    again(0, np.ones(3), weight)
    assert again.states[0] is state
    assert (state == 3).all()


def test_a_loaded_state_that_was_taken_away_or_replaced() -> None:
    """As without a load: an index without a state gets a new one, and a state of another shape is refused."""
    updater, weight, grad = get_updater(AdaGrad(1.0)), np.ones((3, 2)), np.ones((3, 2))
    updater(0, grad, weight)
    data = updater.get_states()
    for take_away in (lambda: updater.states.pop(0), lambda: setattr(updater, "states", {})):
        updater.set_states(data)
        take_away()
        updater(0, grad, weight)
        assert (updater.states[0] == 1).all()
    updater.set_states(data)
    updater.states = {0: np.zeros((3, 2))}
    updater(0, grad, weight)
    assert updater._loaded == {}, "it held the loaded state"
    updater.set_states(data, resize_rows=True)
    updater.states = {0: np.ones((2, 2))}
    with pytest.raises(ValueError, match=r"history in states\[0\]: shape \(2, 2\): must be \(3, 2\)"):
        updater(0, grad, weight)


@pytest.mark.parametrize("tensors", [False, True], ids=["NumPy", "torch"])
def test_resize_rows_changes_no_dtype(tensors: bool) -> None:
    updater = get_updater(AdaGrad())
    updater.states = {0: np.ones((3, 2), np.float64)}
    again, weight = get_updater(AdaGrad()), np.ones((4, 2), np.float32)
    again.set_states(updater.get_states(), resize_rows=True)
    given = [torch.from_numpy(weight)] * 2 if tensors else [weight] * 2
    with pytest.raises((TypeError, ValueError), match=r"history in states\[0\]"):
        again(0, given[0].clone() if tensors else weight.copy(), given[1])
    assert (weight == 1).all()


class WithMomentum(AdaGrad):
    """A step and states of its own, which the rule's checks know nothing of."""

    def create_state(self, index: Any, weight: Any) -> Any:
        return np.zeros_like(weight), np.zeros_like(weight)

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        for index, weight, grad, (history, momentum) in zip(indices, weights, grads, states, strict=True):
            self._update_count(index)
            history += grad * grad
            momentum[...] = 0.5 * momentum + grad
            weight -= self._get_lr(index) * momentum / (np.sqrt(history) + self.epsilon)


class WithMasterLikeState(WithMomentum):
    """The same by MXNet's other way to make states."""

    def create_state_multi_precision(self, index: Any, weight: Any) -> Any:
        return self.create_state(index, weight)


class WithAFusedStep(WithMomentum):
    def fused_step(self, *lists: Any) -> None:
        self.step(*lists)


class Calling(AdaGrad):
    """Overrides both, and changes nothing."""

    def create_state(self, index: Any, weight: Any) -> Any:
        return super().create_state(index, weight)

    def step(self, *lists: Any) -> None:
        super().step(*lists)


@pytest.mark.parametrize("bad", [np.ones(2), RowSparse(np.ones((1, 2)), np.array([7]), (3, 2))], ids=["dense", "rows"])
def test_a_subclass_with_the_rules_states_is_checked_as_a_whole(bad: Any) -> None:
    weights = [np.ones(2), np.ones((3, 2))]
    updater = get_updater(Calling(0.5))
    with pytest.raises((ValueError, IndexError), match=r"grads\[1\]"):
        updater([0, 1], [np.ones(2), bad], weights)
    assert all((w == 1).all() for w in weights)
    assert updater.states == {}
    assert updater.optimizer.num_update == 0
    states = [updater.optimizer.create_state(i, w) for i, w in enumerate(weights)]
    with pytest.raises((ValueError, IndexError), match=r"grads\[1\]"):
        updater.optimizer.update([0, 1], weights, [np.ones(2), bad], states)
    assert all((w == 1).all() for w in weights)


@pytest.mark.parametrize("klass", [WithMomentum, WithMasterLikeState, WithAFusedStep])
@pytest.mark.parametrize("aggregate_num", [1, 2])
def test_states_of_ones_own_in_lists(aggregate_num: int, klass: type[AdaGrad]) -> None:
    updater = get_updater(klass(0.5, epsilon=0.0, aggregate_num=aggregate_num))
    weights, grads = [np.ones(2, np.float32) for _ in range(2)], [np.ones(2, np.float32)] * 2
    for expected in (0.5, 0.5 - 0.5 * 1.5 / np.sqrt(2)):
        updater([0, 1], grads, weights)
        assert np.allclose(weights, expected, rtol=1e-6)


class Adamish(Optimizer):
    """Keeps states in structures of its own."""

    def __init__(self, structure: Any, **kwargs: Any) -> None:
        super().__init__(learning_rate=0.5, use_fused_step=False, **kwargs)
        self.structure = structure

    def create_state(self, index: Any, weight: Any) -> Any:
        return self.structure(weight)

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        for index, weight, grad, state in zip(indices, weights, grads, states, strict=True):
            self._update_count(index)
            first = state[0] if isinstance(state, (tuple, list)) else state
            first[...] += grad
            weight[...] -= self._get_lr(index) * first


@pytest.mark.parametrize("multi_precision", [False, True])
@pytest.mark.parametrize(
    "structure",
    [
        lambda w: (np.zeros_like(w), np.zeros_like(w)),
        lambda w: [np.zeros_like(w), [np.zeros_like(w), None]],
        lambda w: (np.zeros_like(w), (np.zeros_like(w), np.zeros_like(w))),
    ],
)
def test_states_of_any_structure_go_on_after_loading(structure: Any, multi_precision: bool) -> None:
    def make() -> Updater:
        return get_updater(Adamish(structure, multi_precision=multi_precision))

    weights = [np.ones(3, np.float16) for _ in range(2)]
    whole, saved, again = make(), make(), make()
    for _ in range(2):
        whole(0, np.ones(3, np.float16), weights[0])
        saved(0, np.ones(3, np.float16), weights[1])
    again.set_states(saved.get_states(True))
    whole(0, np.ones(3, np.float16), weights[0])
    again(0, np.ones(3, np.float16), weights[1])
    assert_same_bits(weights[1], weights[0])
    assert whole.get_states() == again.get_states()


def test_loaded_states_of_another_structure_are_refused() -> None:
    saved, again = get_updater(Adamish(lambda w: (w * 0, (w * 0, w * 0)))), get_updater(Adamish(lambda w: (w * 0,) * 2))
    saved(0, np.ones(3, np.float32), np.ones(3, np.float32))
    again.set_states(saved.get_states())
    with pytest.raises(ValueError, match=r"states\[0\]\[1\]: .* must be one history"):
        again(0, np.ones(3, np.float32), np.ones(3, np.float32))


def test_loaded_bfloat16_states_of_tensors() -> None:
    def make() -> Updater:
        return get_updater(Adamish(torch.zeros_like))

    weight, saved, again = torch.ones(3, dtype=torch.bfloat16), make(), make()
    saved(0, torch.ones_like(weight), weight)
    again.set_states(saved.get_states())
    again(0, torch.ones_like(weight), weight)
    assert again.states[0].dtype == torch.bfloat16
    assert again.states[0].tolist() == [2.0] * 3


def test_indices_that_are_numpy_integers_are_saved_as_integers() -> None:
    updater, weight = get_updater(AdaGrad()), np.ones(3, np.float32)
    updater.optimizer.set_lr_mult({np.int32(1): 2.0})
    for index in np.arange(2):
        updater(index, weight.copy(), weight)
    again = get_updater(AdaGrad())
    again.set_states(updater.get_states(True))
    assert set(again.states) == {0, 1}
    assert again.optimizer.lr_mult == {1: 2.0}
    assert all(type(index) is int for index in (*again.states, *again.optimizer.lr_mult))


def test_a_schedule_far_on_is_saved_and_loaded() -> None:
    schedule = FactorScheduler(1, 0.9999999, base_lr=0.1)
    updater = get_updater(AdaGrad(None, lr_scheduler=schedule, begin_num_update=12_000_000))
    weight, again = np.ones(1), get_updater(AdaGrad())
    updater(0, np.ones(1), weight)
    again.set_states(updater.get_states(True))
    assert again.optimizer.learning_rate == updater.optimizer.learning_rate == pytest.approx(0.1 * math.exp(-1.2))


@pytest.mark.parametrize("where", ["num_update", "begin_num_update", "index_update_count"])
def test_a_schedule_that_would_take_forever_is_refused(where: str) -> None:
    """A file may ask for 10^12 multiplications at the first step."""
    schedule = FactorScheduler(1, 1 - 1e-13, stop_factor_lr=0.0, base_lr=1.0)
    far: Any = {0: 10**12} if where == "index_update_count" else 10**12
    config = AdaGrad(None, lr_scheduler=schedule).config() | {where: far}
    with pytest.raises(ValueError, match=r"must be <= 100000000 steps of its FactorScheduler"):
        get_updater(AdaGrad()).set_states(checkpoint.encode({}, config))
    optimizer = AdaGrad(None, lr_scheduler=schedule, begin_num_update=10**12)
    with pytest.raises(ValueError, match="cannot be saved: num_update"):
        optimizer.config()


def test_a_schedule_between_the_ends_of_the_numbers() -> None:
    schedule = FactorScheduler(1, 0.5, stop_factor_lr=1e-300, base_lr=1e300)
    updater = get_updater(AdaGrad(None, lr_scheduler=schedule))
    updater.set_states(updater.get_states(True))
    assert updater.optimizer.learning_rate == 1e300


@pytest.mark.parametrize("where", [0, 1])
def test_a_state_without_the_master_copy_is_refused_before_anything_changes(where: int) -> None:
    """Where a subclass takes the step, which gets master copies."""

    class Passes(AdaGrad):
        def update(self, *given: Any) -> None:
            super().update(*given)

    class Steps(AdaGrad):
        def step(self, *given: Any) -> None:
            super().step(*given)

    for klass in (Passes, Steps):
        updater = get_updater(klass(multi_precision=True))
        updater.states[where] = np.zeros(2, np.float32)
        weights, grads = [np.ones(2, np.float16) for _ in range(2)], [np.ones(2, np.float16) for _ in range(2)]
        with pytest.raises(ValueError, match=r"states\[\d\]: one history: must be a pair \(master copy, state\)"):
            updater([0, 1], grads, weights)
        assert [w.tolist() for w in weights] == [[1.0, 1.0]] * 2
        assert (updater.optimizer._index_update_count, list(updater.states)) == ({}, [where])


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("way", ["dense", "rows", "strided", "expression"])
def test_an_interrupt_is_counted_if_it_is_noticed_after_the_kernels(
    way: str, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python notices it when compiled code has returned, or while something is compiled or checked before."""

    def interrupted(*given: Any, **options: Any) -> None:
        if late:
            real(*given, **options)
        raise KeyboardInterrupt

    place, name = {
        "dense": (dense_lists, "_update"),
        "rows": (row_lists, "_update"),
        "strided": (cpu_dense, "_run") if late else (general_path, "validate"),
        "expression": (rule, "step") if late else (expressions, "validate"),
    }[way]
    real = getattr(place, name)
    updater = get_updater(AdaGrad(0.5, epsilon=0.0, use_fused_step=way != "expression"))
    weight = np.ones((6, 1), np.float32)[::2] if way == "strided" else np.ones((3, 1), np.float32)
    grad: Any = np.ones((3, 1), np.float32)
    if way == "rows":
        grad = RowSparse(grad, np.arange(3), (3, 1))
    updater(1, grad, weight.copy())  # compiles what is needed
    with monkeypatch.context() as patched:
        patched.setattr(place, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            updater(0, grad, weight)
    assert weight.ravel().tolist() == [0.5 if late else 1.0] * 3
    assert updater.optimizer._index_update_count == ({1: 1, 0: 1} if late else {1: 1})
    if late:
        assert updater.states[0].ravel().tolist() == [1.0] * 3
    updater(0, grad, weight)
    assert updater.states[0].ravel().tolist() == [2.0 if late else 1.0] * 3
    assert updater.optimizer._index_update_count == {1: 1, 0: 2 if late else 1}


@pytest.mark.parametrize("where", ["in another thread", "in the signal's handler"])
@pytest.mark.parametrize("way", ["dense", "rows"])
def test_another_list_that_is_done_makes_no_interrupt_late(
    way: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupt comes before this list, which is large, is begun, while another one is finished."""
    updater, shape = get_updater(AdaGrad(0.5)), (400, 400)
    values = np.ones(shape, np.float32)
    grad: Any = RowSparse(values, np.arange(400), shape) if way == "rows" else values
    updater(0, grad, np.ones(shape, np.float32))

    def interrupted(*given: Any) -> None:
        monkeypatch.undo()

        def step() -> None:
            get_updater(AdaGrad(0.5))(0, grad, np.ones(shape, np.float32))

        if where == "in another thread":
            thread = threading.Thread(target=step)
            thread.start()
            thread.join()
        else:
            step()
        raise KeyboardInterrupt

    weight = np.ones(shape, np.float32)
    monkeypatch.setattr(outcomes, "on_threads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        updater(0, grad, weight)
    assert (weight == 1).all()
    assert updater.optimizer._index_update_count == {0: 1}


class Decaying(LRScheduler):
    """Decays in place when it is asked, as MXNet's own schedules do, and so those that users have made of them."""

    def __init__(self, step: int, factor: float, base_lr: float) -> None:
        super().__init__(base_lr)
        self.step, self.factor, self.count = step, factor, 0

    def __call__(self, num_update: int) -> float:
        while num_update > self.count + self.step:
            self.count += self.step
            self.base_lr *= self.factor
        return self.base_lr


@pytest.mark.parametrize("aggregate", [None, 2, math.inf])
def test_a_scheduler_with_a_memory_is_asked_once_for_each_weight_in_order(aggregate: float | None) -> None:
    updater = get_updater(AdaGrad(None, lr_scheduler=Decaying(3, 0.1, 0.5), aggregate_num=aggregate))
    a, b = np.ones(1), np.ones(1)
    for _ in range(3):
        updater(["b"], [np.ones(1)], [b])
    updater(["a", "b"], [np.ones(1), np.ones(1)], [a, b])
    assert a == 1 - 0.5 / (1 + 1e-6)  # a's first update is the third in number: before the decay


def test_states_of_what_was_done_before_a_step_raised_are_kept() -> None:
    class Fails(AdaGrad):
        def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
            if 1 in indices:
                raise RuntimeError("not this one")
            super().step(indices, weights, grads, states)

    updater = get_updater(Fails())
    weights = [np.ones(2), np.ones(2)]
    with pytest.raises(RuntimeError, match="not this one"):
        updater([0, 1], [np.full(2, 3.0)] * 2, weights)
    assert updater.states.keys() == {0}
    assert (updater.states[0] == 9).all()
    assert updater.optimizer._index_update_count == {0: 1}


def test_states_of_another_dtype_are_refused_where_the_index_is_known() -> None:
    wide, narrow = get_updater(AdaGrad()), get_updater(AdaGrad())
    wide(0, np.ones(3), np.ones(3))
    narrow(0, np.ones(3, np.float32), np.ones(3, np.float32))
    before = narrow.states[0]
    with pytest.raises(ValueError, match=r"states\[0\]: float64 of shape \(3,\): must be float32 of shape \(3,\)"):
        narrow.set_states(wide.get_states())
    assert narrow.states[0] is before
    tensors = get_updater(AdaGrad())
    tensors(0, torch.ones(3), torch.ones(3))
    tensors.set_states(narrow.get_states())  # of another library, but of the same kind


def test_a_long_training_can_be_saved() -> None:
    for schedule in (FactorScheduler(1), FactorScheduler(1, 0.5), FactorScheduler(10, 0.999, base_lr=0.1)):
        updater = get_updater(AdaGrad(None, lr_scheduler=schedule, begin_num_update=10**8))
        updater(0, np.ones(1), np.ones(1))
        again = get_updater(AdaGrad())
        again.set_states(updater.get_states(dump_optimizer=True))
        assert again.optimizer.learning_rate == updater.optimizer.learning_rate


def test_states_of_a_users_own_kind_are_left_to_its_step() -> None:
    class Own(AdaGrad):
        """Its states are arrays, too, of another shape."""

        def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
            for weight, grad, state in zip(weights, grads, states, strict=True):
                state += 1
                weight -= grad

        def create_state(self, index: Any, weight: Any) -> Any:
            return np.zeros(7)

    updater, weights = get_updater(Own()), [np.ones(2), np.ones(2)]
    updater([0, 1], [np.ones(2)] * 2, weights)
    assert all((weight == 0).all() for weight in weights)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No such folder.*nowhere'$"):
        get_updater(AdaGrad()).save_states(tmp_path / "nowhere" / "states")


def test_a_schedule_here_is_kept_when_the_saved_one_was_custom() -> None:
    saved = get_updater(AdaGrad(None, lr_scheduler=lambda t: 0.5))
    data = saved.get_states(dump_optimizer=True)
    here = get_updater(AdaGrad(None, lr_scheduler=PolyScheduler(10, 0.25)))
    here.set_states(data)  # without a warning
    assert here.optimizer.learning_rate == 0.25


class OwnStates(AdaGrad):
    """States of another form than the library's, in a step of its own."""

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        self._update_count(list(indices))


def test_states_for_a_step_of_ones_own_are_not_checked_for_sparse_gradients_without_kernels() -> None:
    class Own(OwnStates):
        def create_state(self, index: Any, weight: Any) -> Any:
            return {"any": "thing"}

    weights = [np.ones((3, 2), np.float32) for _ in range(2)]
    updater = get_updater(Own(use_fused_step=False))
    updater([0, 1], [RowSparse(np.ones((1, 2), np.float32), np.array([1]), (3, 2)) for _ in weights], weights)
    assert updater.optimizer._index_update_count == {0: 1, 1: 1}


def test_pairs_that_are_not_master_copies_are_not_checked_as_such() -> None:
    class Own(OwnStates):
        def create_state(self, index: Any, weight: Any) -> Any:
            return np.zeros_like(weight), np.zeros(weight.shape, np.float32)

    weights = [np.ones((3, 2), np.float16) for _ in range(2)]
    updater = get_updater(Own())
    updater([0, 1], [np.ones_like(w) for w in weights], weights)
    assert updater.optimizer._index_update_count == {0: 1, 1: 1}


@pytest.mark.parametrize(
    ("klass", "shape", "dtype"), [(AdaGrad, (3, 2), np.float64), (GroupAdaGrad, (), np.float32)], ids=["dtype", "0-d"]
)
def test_histories_of_another_form_are_not_checked(klass: type[AdaGrad], shape: Any, dtype: Any) -> None:
    class Own(klass):  # type: ignore[misc, valid-type]
        def create_state(self, index: Any, weight: Any) -> Any:
            return np.zeros(shape, dtype)

        step = OwnStates.step

    weights = [np.ones(shape, np.float32), np.ones(shape, np.float32)]
    updater = get_updater(Own())
    updater([0, 1], [np.ones_like(w) for w in weights], weights)
    assert updater.optimizer._index_update_count == {0: 1, 1: 1}


def test_a_bad_index_is_found_before_the_first_step_with_a_custom_scheduler() -> None:
    updater, weights = get_updater(AdaGrad(None, lr_scheduler=lambda t: 0.5)), [np.ones(2), np.ones(2)]
    with pytest.raises(TypeError, match=r"^index=1.5: must be an integer or a string"):
        updater([0, 1.5], [np.ones(2), np.ones(2)], weights)
    assert (weights[0] == 1).all()
    assert updater.states == updater.optimizer._index_update_count == {}


def test_a_schedule_of_zeros_can_be_saved() -> None:
    optimizer = AdaGrad(None, lr_scheduler=FactorScheduler(1, 0.5, base_lr=0.0))
    assert optimizer.config()["lr_scheduler"][0] == "FactorScheduler"


def test_how_far_a_saved_schedule_may_be() -> None:
    long_steps = FactorScheduler(1000, 1 - 1e-13, stop_factor_lr=0.0, base_lr=1.0)
    AdaGrad(None, lr_scheduler=long_steps, begin_num_update=10**10).config()  # 10^7 multiplications
    to_the_end = FactorScheduler(1, 1 - 1e-6, stop_factor_lr=0.0, base_lr=1.0)  # 7 * 10^8, until it is 0
    with pytest.raises(ValueError, match="cannot be saved: num_update"):
        AdaGrad(None, lr_scheduler=to_the_end, begin_num_update=10**9).config()


def test_the_last_schedule_that_can_be_saved() -> None:
    schedule = FactorScheduler(1, 1 - 1e-13, stop_factor_lr=0.0, base_lr=1.0)
    AdaGrad(None, lr_scheduler=schedule, begin_num_update=MOST_DECAYS - 1).config()
    with pytest.raises(ValueError, match="cannot be saved: num_update"):
        AdaGrad(None, lr_scheduler=schedule, begin_num_update=MOST_DECAYS).config()
