"""AdaGrad.update, step and fused_step: which is called with what, steps written for MXNet, arguments."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from adagrad import AdaGrad, GroupAdaGrad, RowSparse, arrays, get_updater
from adagrad.kernels import fast_path, general_path
from adagrad.lr_scheduler import PolyScheduler
from support import BFLOAT16, assert_same_bits, refuse_the_general_path, set_layout
from training import CLASSES, FUSED, expected, sparse, weights_of

# ------------------------------------------------------------------------------------------------------------- dispatch


class Recording(AdaGrad):
    """Notes the calls of step and fused_step, each with its indices, and goes on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[tuple[str, list[Any]]] = []

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        self.calls.append(("step", list(indices)))
        assert len(indices) == len(weights) == len(grads) == len(states)
        super().step(indices, weights, grads, states)

    def fused_step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        self.calls.append(("fused_step", list(indices)))
        super().fused_step(indices, weights, grads, states)


@pytest.mark.parametrize(
    ("fused", "kinds", "calls"),
    [
        (False, "ddd", [("step", [0, 1, 2])]),
        (False, "sds", [("step", [0, 1, 2])]),
        (False, "sss", [("step", [0, 1, 2])]),
        (True, "ddd", [("fused_step", [0, 1, 2]), ("step", [0, 1, 2])]),
        (True, "sds", [("fused_step", [0, 1, 2]), ("step", [1])]),
        (True, "dsd", [("fused_step", [0, 1, 2]), ("step", [0, 2])]),
        (True, "sss", [("fused_step", [0, 1, 2])]),
        (True, "d", [("fused_step", [0]), ("step", [0])]),
        (True, "s", [("fused_step", [0])]),
        (False, "s", [("step", [0])]),
    ],
)
@pytest.mark.parametrize("method", ["update", "update_multi_precision"])
def test_which_method_sees_what(method: str, fused: bool, kinds: str, calls: Any) -> None:
    weights = weights_of(*[(4, 2)] * len(kinds))
    grads: list[Any] = [
        np.ones_like(w) if kind == "d" else sparse(w, [1, 3, 1]) for w, kind in zip(weights, kinds, strict=True)
    ]
    optimizer, plain = Recording(0.1, wd=0.1, use_fused_step=fused), AdaGrad(0.1, wd=0.1, use_fused_step=fused)
    other = copy.deepcopy(weights)
    indices = list(range(len(kinds)))
    for each, given in ((optimizer, weights), (plain, other)):
        states = [each.create_state(i, w) for i, w in enumerate(given)]
        getattr(each, method)(indices, given, grads, states)
    assert optimizer.calls == calls
    assert optimizer._index_update_count == plain._index_update_count == dict.fromkeys(indices, 1)
    for mine, theirs in zip(weights, other, strict=True):
        assert_same_bits(mine, theirs)


@pytest.mark.parametrize("klass", [AdaGrad, GroupAdaGrad])
@pytest.mark.parametrize("dtype", [np.float16, np.dtype(np.float16).newbyteorder(), BFLOAT16], ids=str)
def test_a_master_copy_that_was_asked_for_must_be_there(klass: type[AdaGrad], dtype: Any) -> None:
    """A history alone would be updated, too, with the precision that was to be avoided."""
    optimizer = klass(0.1, multi_precision=True)
    weights = [np.ones((2, 3), np.float32), np.ones((2, 3), dtype)]
    states = [optimizer.create_state(i, w) for i, w in enumerate(weights)]
    with pytest.raises(ValueError, match=r"states\[1\]: one history: must be a pair \(master copy, history\)"):
        optimizer.update_multi_precision([0, 1], weights, [np.ones_like(w) for w in weights], states)
    assert all((w == 1).all() for w in weights)
    klass(0.1).update_multi_precision([0, 1], weights, [np.ones_like(w) for w in weights], states)
    optimizer.update(1, weights[1], np.ones_like(weights[1]), states[1])  # which handles no master copies


def test_a_step_of_ones_own_is_all_that_happens_to_dense_gradients() -> None:
    """Without super(): the sparse part is still the kernels'."""

    class Signed(AdaGrad):
        def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
            for weight, grad in zip(weights, grads, strict=True):
                weight -= self.learning_rate * np.sign(grad)

    for fused in (True, False):
        dense, rows = weights_of((3, 2), (3, 2))
        before = dense.copy(), rows.copy()
        optimizer = Signed(0.5, use_fused_step=fused)
        states = [optimizer.create_state(i, w) for i, w in enumerate((dense, rows))]
        grads = [np.full((3, 2), 7, np.float32), sparse(rows, [2]) if fused else np.ones((3, 2), np.float32)]
        optimizer.update([0, 1], [dense, rows], grads, states)
        assert_same_bits(dense, before[0] - np.float32(0.5))
        if fused:
            assert_same_bits(rows[2], expected(before[1][2], np.ones(2, np.float32), lr=0.5))
            assert optimizer._index_update_count[1] == 1


def test_a_fused_step_of_ones_own() -> None:
    class Nothing(AdaGrad):
        def fused_step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
            pass

    for fused in (True, False):
        (weight,) = weights_of((3, 2))
        before = weight.copy()
        optimizer = Nothing(use_fused_step=fused)
        optimizer.update(0, weight, np.ones_like(weight), optimizer.create_state(0, weight))
        assert (weight == before).all() == fused
        assert optimizer.num_update == (0 if fused else 1)


class OnDevice(torch.Tensor):
    """A tensor that says it is elsewhere."""

    device = torch.device("cuda:0")  # type: ignore[assignment]


@pytest.mark.parametrize("klass", [AdaGrad, Recording], ids=["step as it is", "step of a subclass"])
def test_mixed_lists_on_a_device(klass: type[AdaGrad], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each update of the list is carried out once. Without a subclass to watch, in one launch: all or nothing there."""
    launches = []

    def prepare(launch: Any, grad_scale: Any, found_inf: Any) -> Any:
        ((dense, rows),) = launch._groups.values()
        names = [(u.tensors[0], False) for u in dense] + [(u.tensors[0][0], True) for u in rows]
        return lambda: launches.append([(int(weight[0]), is_sparse) for weight, is_sparse in names])

    as_operand = arrays._tensor
    monkeypatch.setattr(arrays, "_tensor", lambda *given: as_operand(*given)._replace(device="cuda:0", memory=None))
    set_layout(monkeypatch, None)
    monkeypatch.setattr(general_path.DeviceUpdates, "job", prepare)
    weights = [torch.full((4,), i, dtype=torch.float32) for i in range(4)]
    grads: list[Any] = [torch.ones(4) for _ in weights]
    for i in (1, 2):
        grads[i] = RowSparse(torch.ones(1), torch.tensor([3]).as_subclass(OnDevice), (4,))
    optimizer = klass()
    optimizer.update(list(range(4)), weights, grads, [torch.zeros(4) for _ in weights])
    updates = [(0, False), (1, True), (2, True), (3, False)]
    assert sorted(update for launch in launches for update in launch) == updates
    assert klass is Recording or len(launches) == 1
    assert optimizer._index_update_count == dict.fromkeys(range(4), 1)


def test_a_step_set_on_the_object_gets_dense_gradients() -> None:
    optimizer, weight, seen = AdaGrad(), np.ones(2, np.float32), list[Any]()
    optimizer.step = lambda indices, *lists: seen.append(indices)  # type: ignore[method-assign]
    optimizer.update(0, weight, np.ones(2, np.float32), optimizer.create_state(0, weight))
    assert seen == [[0]]
    assert (weight == 1).all()


@pytest.mark.parametrize("klass", [AdaGrad, GroupAdaGrad])
@pytest.mark.parametrize("name", ["step", "fused_step", "update", "update_multi_precision"])
def test_methods_replaced_on_the_class_are_called(name: str, klass: type[AdaGrad]) -> None:
    """As by a spy: with the weights of each step, as a subclass's are."""
    with mock.patch.object(AdaGrad, name, autospec=True, side_effect=getattr(AdaGrad, name)) as spy:
        updater = get_updater(klass(0.5, epsilon=0.0, aggregate_num=2))
        weights = [np.ones(2, np.float32) for _ in range(3)]
        updater([0, 1, 2], [np.full(2, 2, np.float32) for _ in range(3)], weights)
    assert [call.args[1] for call in spy.call_args_list] == [[0, 1], [2]]
    assert all((weight == 0.5).all() for weight in weights)


@pytest.mark.parametrize("where", ["class", "object"])
def test_a_step_of_ones_own_gets_its_own_states_and_master_copies(where: str) -> None:
    """Wherever it is set."""

    class Own(AdaGrad):
        def create_state(self, index: Any, weight: Any) -> Any:
            return {}

    def step(indices: Any, weights: Any, grads: Any, states: Any) -> None:
        for weight, state in zip(weights, states, strict=True):
            state["dtype"] = weight.dtype

    optimizer = Own(multi_precision=True, aggregate_num=2)
    if where == "class":
        Own.step = lambda self, *lists: step(*lists)  # type: ignore[method-assign]
    else:
        optimizer.step = step  # type: ignore[method-assign]
    updater = get_updater(optimizer)
    dtypes = np.float32, np.float32, np.float16
    updater([0, 1, 2], [np.ones(2, dtype) for dtype in dtypes], [np.ones(2, dtype) for dtype in dtypes])
    assert updater.states[1] == {"dtype": np.float32}
    assert updater.states[2][1] == {"dtype": np.float32}


def test_an_overridden_update_gets_master_copies() -> None:
    seen = []

    class Own(AdaGrad):
        def update(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
            seen.extend(weight.dtype for weight in weights)
            super().update(indices, weights, grads, states)

    optimizer, weight = Own(multi_precision=True), np.ones(2, np.float16)
    optimizer.update_multi_precision(
        0, weight, np.ones(2, np.float16), optimizer.create_state_multi_precision(0, weight)
    )
    assert seen == [np.float32]


# ---------------------------------------------------------------------------------------------- steps written for MXNet


class MXNetStyle(AdaGrad):
    """As AdaGrad.step is written in MXNet: counts and rates asked for one by one."""

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        for index, weight, grad, state in zip(indices, weights, grads, states, strict=True):
            self._update_count(index)
            lr, wd = np.float32(self._get_lr(index)), np.float32(self._get_wd(index))
            grad = grad * np.float32(self.rescale_grad) + wd * weight
            state[...] += grad * grad
            weight[...] -= lr * (grad / (np.sqrt(state) + np.float32(self.epsilon)))


class MXNetStyleLists(MXNetStyle):
    """The same with the list forms of the helpers."""

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        self._update_count(indices)
        for weight, grad, state, lr, wd in zip(
            weights, grads, states, self._get_lrs(indices), self._get_wds(indices), strict=True
        ):
            grad = grad * np.float32(self.rescale_grad) + np.float32(wd) * weight
            state[...] += grad * grad
            weight[...] -= np.float32(lr) * (grad / (np.sqrt(state) + np.float32(self.epsilon)))


@pytest.mark.parametrize("klass", [MXNetStyle, MXNetStyleLists])
@pytest.mark.parametrize("kinds", ["dd", "dsd", "sd", "ds"])
@FUSED
def test_steps_written_for_mxnet(klass: type[AdaGrad], kinds: str, fused: bool) -> None:
    """A count for each call, the rate at that moment, also when the dense part is handed on from fused_step."""
    if not fused and "s" in kinds:
        kinds = kinds.replace("s", "d")  # such a step knows dense gradients
    made = []
    for each in (klass, AdaGrad):
        schedule = PolyScheduler(max_update=10, base_lr=0.5)
        optimizer = each(None, wd=0.1, lr_scheduler=schedule, use_fused_step=fused)
        optimizer.set_lr_mult({1: 0.5})
        weights = weights_of(*[(4, 2)] * len(kinds))
        states = [optimizer.create_state(i, w) for i, w in enumerate(weights)]
        for _ in range(4):
            grads: list[Any] = [
                np.ones_like(w) if k == "d" else sparse(w, [2, 2]) for w, k in zip(weights, kinds, strict=True)
            ]
            optimizer.update(list(range(len(kinds))), weights, grads, states)
        made.append((weights, optimizer._index_update_count, optimizer.num_update))
    assert made[0][1:] == made[1][1:] == (dict.fromkeys(range(len(kinds)), 4), 4)
    if klass is MXNetStyle or "s" in kinds:  # the list forms resolve all rates after all counts, as in MXNet
        for mine, theirs in zip(made[0][0], made[1][0], strict=True):
            assert_same_bits(mine, theirs)


@pytest.mark.parametrize("klass", [MXNetStyle, MXNetStyleLists])
@FUSED
def test_steps_written_for_mxnet_see_the_master_copy(klass: type[AdaGrad], fused: bool) -> None:
    """Under multi_precision a step of one's own gets float32 weights, gradients and histories."""
    results = []
    for each in (klass, AdaGrad):
        optimizer = each(0.1, wd=0.1, multi_precision=True, use_fused_step=fused)
        half, single = weights_of((4, 2), dtype=np.float16)[0], weights_of((4, 2))[0]
        states = [optimizer.create_state_multi_precision(i, w) for i, w in enumerate((half, single))]
        for _ in range(3):
            grads = [np.full((4, 2), 0.3, w.dtype) for w in (half, single)]
            optimizer.update_multi_precision([0, 1], [half, single], grads, states)
        results.append([half, single, *states[0], states[1]])
    for mine, theirs in zip(*results, strict=True):
        assert_same_bits(mine, theirs)


def test_rates_are_resolved_anew_after_a_step_that_raised() -> None:
    class Raises(MXNetStyle):
        def step(self, *lists: Any) -> None:
            if self.lr == 1.0:
                raise RuntimeError("once")
            super().step(*lists)

    optimizer, weights = Raises(1.0), weights_of((4, 2), (4, 2))
    states = [optimizer.create_state(i, w) for i, w in enumerate(weights)]
    grads: list[Any] = [np.ones_like(weights[0]), sparse(weights[1], [2])]
    with pytest.raises(RuntimeError, match="once"):
        optimizer.update([0, 1], weights, grads, states)
    optimizer.set_learning_rate(0.5)
    before = copy.deepcopy(weights)
    optimizer.update([0, 1], weights, grads, states)
    assert_same_bits(weights[0], expected(before[0], grads[0], lr=0.5))
    assert_same_bits(weights[1][2], expected(before[1], grads[0], lr=0.5)[2])
    assert optimizer._index_update_count == {0: 1, 1: 1}


# ------------------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize("method", ["update", "update_multi_precision", "step", "fused_step"])
@pytest.mark.parametrize("form", ["single", "list", "tuple"])
@pytest.mark.parametrize("kind", ["dense", "sparse", "0-d"])
def test_single_arguments_and_lists(method: str, form: str, kind: str) -> None:
    (weight,) = weights_of(() if kind == "0-d" else (4, 2))
    before, optimizer = weight.copy(), AdaGrad()
    grad = sparse(weight, [0, 1, 2, 3]) if kind == "sparse" else np.ones_like(weight)
    arguments: Any = (0, weight, grad, optimizer.create_state(0, weight))
    if form != "single":
        arguments = [{"list": list, "tuple": tuple}[form]([each]) for each in arguments]
    getattr(optimizer, method)(*arguments)
    assert_same_bits(weight, expected(before, np.ones_like(before), lr=0.01))
    assert optimizer._index_update_count == {0: 1}


@pytest.mark.parametrize("klass", CLASSES)
@FUSED
def test_the_gradient_is_never_written_to(klass: type[AdaGrad], fused: bool) -> None:
    for dtype in (np.float32, np.float16):
        (weight,) = weights_of((4, 2), dtype=dtype)
        optimizer = klass(rescale_grad=3.0, clip_gradient=0.1, wd=0.1, use_fused_step=fused, multi_precision=True)
        state = optimizer.create_state_multi_precision(0, weight)
        grad, rows = np.full((4, 2), 0.7, dtype), sparse(weight, [1, 1, 3], 0.7)
        for given in (grad, rows):
            parts = [given] if isinstance(given, np.ndarray) else [given.values, given.indices]
            before = [part.tobytes() for part in parts]
            for part in parts:
                part.setflags(write=False)
            optimizer.update_multi_precision(0, weight, given, state)
            assert [part.tobytes() for part in parts] == before


@pytest.mark.parametrize("grads", [1, 41])
@pytest.mark.parametrize("method", ["_check", "update", "step", "fused_step"])
def test_lists_of_different_lengths(method: str, grads: int) -> None:
    weights = [np.ones(3, np.float32) for _ in range(40)]
    states = [np.zeros(3, np.float32) for _ in range(40)]
    with pytest.raises(ValueError, match=f"grads: {grads} entries: must be 40, as many as indices"):
        getattr(AdaGrad(), method)(list(range(40)), weights, [np.ones(3, np.float32)] * grads, states)


@pytest.mark.parametrize("fused", [True, False])
def test_a_single_number_in_another_byte_order(fused: bool) -> None:
    for name in ("float32", "bfloat16"):
        dtype = np.dtype(name if name != "bfloat16" else BFLOAT16)
        swapped = np.array(1.5, dtype).astype(dtype.newbyteorder())
        plain = np.array(1.5, dtype)
        for weight in (plain, swapped):
            optimizer = AdaGrad(0.5, use_fused_step=fused)
            optimizer.update(0, weight, np.ones((), np.float32), optimizer.create_state(0, weight))
        assert float(plain) == pytest.approx(1.0, abs=1e-5)
        assert swapped.astype(dtype) == plain


def test_strings_of_numpy_2() -> None:
    if not hasattr(np.dtypes, "StringDType"):
        pytest.skip(reason="no StringDType in this NumPy")
    weight = np.array(["a"], dtype=np.dtypes.StringDType())
    with pytest.raises(TypeError, match=r"weights\[0\]: dtype StringDType"):
        AdaGrad().update(0, weight, np.ones(1), np.zeros(1))


def test_row_ids_of_a_class_that_refuses_to_be_compared() -> None:
    class Proud(np.ndarray):
        def __array_ufunc__(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("not with me")

    indices = np.array([1, 0, 1]).view(Proud)
    results = []
    for fused in (True, False):
        optimizer, weight = AdaGrad(use_fused_step=fused), np.ones((3, 2), np.float32)
        rows = RowSparse(np.ones((3, 2), np.float32), indices, (3, 2))
        optimizer.update(0, weight, rows, optimizer.create_state(0, weight))
        results.append(weight)
    assert_same_bits(*results)


def test_a_gradient_that_a_reduction_of_numpy_returns() -> None:
    """The intercept of a linear model: the mean of an array is no array."""
    with pytest.raises(TypeError, match=r"grads\[0\]=.*not numpy\.float32: numpy\.asarray makes an array of it"):
        AdaGrad().update(0, np.zeros((), np.float32), np.ones(3, np.float32).mean(), np.zeros((), np.float32))


@pytest.mark.parametrize("kinds", ["d", "ddd", "s", "ss", "sdsd"])
@pytest.mark.parametrize("row_wise", [False, True])
def test_pairs_of_master_copy_and_history_take_the_fast_path(
    kinds: str, row_wise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the bits of the general path."""

    def updated() -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        optimizer = (GroupAdaGrad if row_wise else AdaGrad)(0.1, wd=0.01, multi_precision=True)
        weights = [rng.random((5, 3)).astype(np.float16) for _ in kinds]
        weights[-1] = weights[-1].astype(np.float32)  # one without a master copy
        states = [optimizer.create_state_multi_precision(i, w) for i, w in enumerate(weights)]
        grads: list[Any] = [rng.random((5, 3)).astype(w.dtype) for w in weights]
        for i, kind in enumerate(kinds):
            if kind == "s":
                grads[i] = RowSparse(grads[i][:3], np.array([4, 0, 4]), (5, 3))
        for _ in range(2):
            optimizer.update_multi_precision([*range(len(kinds))], weights, grads, states)
        pairs = [state if isinstance(state, (tuple, list)) else (state,) for state in states]
        return [*weights, *(each for pair in pairs for each in pair)]

    with monkeypatch.context() as within:
        refuse_the_general_path(within)
        fast = updated()
    monkeypatch.setattr(fast_path, "update_plain", lambda *_, **__: False)
    for a, b in zip(fast, updated(), strict=True):
        assert_same_bits(a, b)
