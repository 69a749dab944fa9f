"""States that an updater saves and loads: training goes on as it was, and what does not fit is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adagrad import AdaGrad, GroupAdaGrad, Updater, get_updater
from adagrad.lr_scheduler import CosineScheduler, FactorScheduler, MultiFactorScheduler, PolyScheduler
from support import BFLOAT16, assert_same_bits, normal
from training import INDICES, assert_same_states, make_weights, optimizer, run

# ------------------------------------------------------------------------------------------------------------- going on


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


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No such folder.*nowhere'$"):
        get_updater(AdaGrad()).save_states(tmp_path / "nowhere" / "states")


def test_files_of_a_subclass_contain_what_it_makes_of_the_states(tmp_path: Path) -> None:
    class Reversed(Updater[AdaGrad]):
        def get_states(self, dump_optimizer: bool = False) -> bytes:
            return super().get_states(dump_optimizer)[::-1]

        def set_states(self, states: bytes, *, resize_rows: bool = False) -> None:
            super().set_states(memoryview(states)[::-1], resize_rows=resize_rows)  # type: ignore[arg-type]

    updater, again = Reversed(AdaGrad(0.5)), Reversed(AdaGrad())
    updater.states = {0: np.arange(5.0)}
    updater.save_states(tmp_path / "states", dump_optimizer=True)
    assert (tmp_path / "states").read_bytes() == updater.get_states(dump_optimizer=True)
    again.load_states(tmp_path / "states")
    assert_same_bits(again.states[0], updater.states[0])
    assert again.optimizer.learning_rate == 0.5


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


# --------------------------------------------------------------------------------------------------------- other shapes


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
    expected = r"must be float64 of shape \(5, 3\), like this updater's"
    hint = "; resize_rows=True lets the number of rows change"
    with pytest.raises(ValueError, match=rf"states\[0\]: float64 of shape \(4, 3\): {expected}{hint}$"):
        filled.set_states(updater.get_states())
    narrow = get_updater(AdaGrad())
    narrow(0, np.ones((4, 2)), np.ones((4, 2)))
    with pytest.raises(ValueError, match=rf"states\[0\]: float64 of shape \(4, 2\): {expected}$"):
        filled.set_states(narrow.get_states())
    assert filled.states[0].shape == (5, 3)
    filled.set_states(updater.get_states(), resize_rows=True)
    with pytest.raises(ValueError, match="shape"):
        filled(0, np.ones((4, 2)), np.ones((4, 2)))  # columns are not rows


@pytest.mark.parametrize(
    "other", [np.ones((6, 2), np.float32), np.ones((6, 3)), np.ones(3, np.float32), (np.ones((6, 3), np.float32),) * 2]
)
def test_resize_rows_lets_nothing_else_change(other: Any) -> None:
    updater, file = get_updater(AdaGrad()), get_updater(AdaGrad())
    before = updater.states[0] = np.full((4, 3), 5, np.float32)
    file.states[0] = other
    with pytest.raises(ValueError, match=r"states\[0\]: .* must be float32 of shape \(n, 3\), like this updater's$"):
        updater.set_states(file.get_states(), resize_rows=True)
    assert updater.states[0] is before
    assert (before == 5).all()
    file.states[0] = np.ones((6, 3), np.float32)
    updater.set_states(file.get_states(), resize_rows=True)


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


# ------------------------------------------------------------------------------------------------------ what is refused


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


class Momentum(AdaGrad):
    """Its states may be anything."""


@pytest.mark.parametrize("klass", [AdaGrad, GroupAdaGrad])
@pytest.mark.parametrize("has_master", [False, True])
def test_a_negative_history_is_refused(klass: type[AdaGrad], has_master: bool) -> None:
    """As momentum in a file of MXNet, which does not say which optimizer wrote it; a master copy may be negative."""
    weight = np.full((2, 3), -1, np.float16 if has_master else np.float32)
    updater = get_updater(klass(0.1, multi_precision=has_master))
    updater(0, weight * 0.5, weight)
    data = updater.get_states()
    updater.set_states(data)
    bad = copy.deepcopy(updater.states)
    history = bad[0][1] if has_master else bad[0]
    history[1, 0] = -0.25
    other = get_updater(Momentum(0.1))
    other.states = bad
    with pytest.raises(ValueError, match=r"states\[0\]: -0.25: a history must be >= 0"):
        updater.set_states(other.get_states())
    assert updater.get_states() == data, "nothing has changed"
    other.set_states(other.get_states())


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
