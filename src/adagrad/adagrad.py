"""AdaGrad."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from adagrad import checks, dialects, kernels
from adagrad.arguments import as_lists, check_low_precision, require_masters
from adagrad.arrays import LOW_PRECISION, computing_format, format_of, operand
from adagrad.dialects import default
from adagrad.optimizer import Optimizer, Options, register
from adagrad.rates import Index, check_indices
from adagrad.rule import Array, Rule, history_shape, is_torch

if sys.version_info >= (3, 11):
    from typing import Unpack
elif TYPE_CHECKING:
    from typing_extensions import Unpack


_OTHER_NAMES = {
    "lr": "learning_rate",
    "eps": "epsilon",
    "float_stable_eps": "epsilon",
    "weight_decay": "wd",
    "clip_value": "clip_gradient",
    "clipvalue": "clip_gradient",
    "lr_decay": "an lr_scheduler",
    "maximize": "a negative rescale_grad",
    "row_wise": "another class, GroupAdaGrad",
}
"""What other frameworks call the arguments."""


def _similar(name: str) -> str:
    """Return a question that ends the message about an unknown argument, or nothing."""
    import difflib

    known = Options.__annotations__.keys() | AdaGrad.__init__.__annotations__.keys() - {"kwargs", "return"}
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f": did you mean {found[0]!r}?" if found else ""


@register
class AdaGrad(Optimizer):
    r"""AdaGrad: one step size per element, which shrinks as its squared gradients accumulate.

    .. math::

        g &= \mathrm{clip}(\mathtt{rescale\_grad} \cdot g,\ \pm\mathtt{clip\_gradient}) + \mathtt{wd} \cdot w \\
        h &= h + g^2 \\
        w &= w - \mathtt{lr} \cdot \frac{g}{\sqrt{h} + \epsilon}

    with weight :math:`w`, gradient :math:`g` and history :math:`h`. Operations are rounded individually, in this order,
    in float64 for float64 weights and in float32 for all others; the history has the same precision.

    Parameters
    ----------
    learning_rate : float, default 0.01
        Initial learning rate; unless it is None, it overwrites the ``base_lr`` of an ``lr_scheduler``.
    epsilon : float, default 1e-6
        Added to the square root to avoid division by zero. Finite, >= 0.
    use_fused_step : bool, default True
        Whether to use the compiled kernels; if False, plain array expressions. If a subclass overrides :meth:`step`,
        dense gradients always go through it.
    initial_accumulator_value : float, default 0.0
        Initial history. Finite, >= 0.
    dialect : str, default "mxnet"
        The framework to follow, one of :data:`~adagrad.dialects.DIALECTS`. Its defaults apply to every argument not
        passed.
    epsilon_inside : bool, default that of the dialect
        Divide by :math:`\sqrt{h + \epsilon}` instead.
    decoupled_decay : bool, default that of the dialect
        Apply weight decay separately from the gradient, so that it does not enter the history:
        ``w -= lr * (g / divisor + wd * w)``.
    **kwargs
        rescale_grad, param_idx2name, wd, clip_gradient, lr_scheduler, sym, begin_num_update, multi_precision,
        param_dict, aggregate_num: see :class:`~adagrad.Optimizer`.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or value; the message names it.

    References
    ----------
    Duchi, Hazan, Singer: Adaptive Subgradient Methods for Online Learning and Stochastic Optimization.
    JMLR 12, 2011, figure 1 (diagonal case).

    Examples
    --------
    >>> import numpy as np
    >>> from adagrad import AdaGrad
    >>> weight, gradient = np.ones(3, np.float32), np.array([1.0, -2.0, 0.0], np.float32)
    >>> optimizer = AdaGrad(learning_rate=0.5)
    >>> state = optimizer.create_state(0, weight)
    >>> optimizer.update(0, weight, gradient, state)
    >>> weight
    array([0.5000005, 1.4999998, 1.       ], dtype=float32)
    """

    row_wise = False
    """Whether the history is one value for each row."""

    def __init__(
        self,
        learning_rate: float | None = default(0.01),
        epsilon: float = default(1e-6),
        use_fused_step: bool = True,
        *,
        initial_accumulator_value: float = default(0.0),
        dialect: str = "mxnet",
        epsilon_inside: bool | None = None,
        decoupled_decay: bool | None = None,
        **kwargs: Unpack[Options],
    ) -> None:
        preset = dialects.find(dialect)
        learning_rate, epsilon, initial_accumulator_value = preset.numbers(
            learning_rate, epsilon, initial_accumulator_value, self.row_wise
        )
        self.epsilon_inside, self.decoupled_decay = preset.options(epsilon_inside, decoupled_decay)
        # Checked before the base class overwrites the base_lr of a scheduler.
        self.epsilon = checks.non_negative("epsilon", epsilon)
        self.initial_accumulator_value = checks.non_negative("initial_accumulator_value", initial_accumulator_value)
        for name in kwargs.keys() - Options.__annotations__.keys():
            other = _OTHER_NAMES.get(name)
            hint = f": here it is {other}" if other and not (name == "row_wise" and self.row_wise) else _similar(name)
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {name!r}{hint}")
        super().__init__(learning_rate=learning_rate, use_fused_step=use_fused_step, **kwargs)
        self._rule_given: tuple[Any, ...] = ()

    def create_state(self, index: Index, weight: Array) -> Array:
        """Create the initial history, filled with ``initial_accumulator_value``.

        It has the shape of the weight, or ``(n, 1, ...)`` if row-wise; float64 for a float64 weight, else float32; a
        torch tensor on the weight's device for a torch weight, else NumPy. ValueError for a 0-d weight if row-wise.
        """
        w = operand("weight", weight)
        if self.row_wise and not w.shape:
            raise ValueError("weight: shape (): row-wise history needs rows: one dimension or more")
        value = checks.non_negative("initial_accumulator_value", self.initial_accumulator_value)
        shape, dtype = history_shape(w.shape, row_wise=self.row_wise), computing_format(w.format)
        if value > float(np.finfo(dtype).max):
            raise ValueError(f"initial_accumulator_value={value!r}: must be finite in {dtype}, the history's dtype")
        if is_torch(weight):
            return weight.detach().new_full(shape, value, dtype=getattr(sys.modules["torch"], dtype))
        if w.array.flags.c_contiguous or self.row_wise:
            # np.zeros gets untouched pages from the system, often of 2 MB: they take memory only when first used.
            return np.zeros(shape, dtype) if value == 0 else np.full(shape, value, dtype)
        return np.full_like(w.array, value, dtype=dtype)

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        """Update each weight once: by the kernels if ``use_fused_step``, else by array expressions.

        The expressions are those of :mod:`adagrad.rule`; the results are the same bit for bit. Parameters and errors
        as in :meth:`~adagrad.Optimizer.update`.
        """
        indices, weights, grads, states = as_lists(indices, weights, grads, states)
        lrs, wds, counts = self._resolve(indices)
        self._carry_out(weights, grads, states, lrs, wds, counts, fused=self.use_fused_step)

    def fused_step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        """Update each weight once, by the kernels; dense gradients by :meth:`step` if that is overridden.

        Parameters and errors as in :meth:`~adagrad.Optimizer.update`.
        """
        overrides_step = self._overrides("step")
        indices, weights, grads, states = as_lists(indices, weights, grads, states)
        are_sparse = list(map(kernels.is_row_sparse, grads)) if overrides_step else []
        if overrides_step and not any(are_sparse):
            self.step(indices, weights, grads, states)
            return
        lrs, wds, counts = self._resolve(indices)
        if not overrides_step or all(are_sparse):
            self._carry_out(weights, grads, states, lrs, wds, counts, fused=True)
            return
        # The overridden step gets the dense part; the whole list is checked before anything changes.
        self._check_known(weights, grads, states, lrs, wds, fused=True, wait=True)
        dense = [i for i, each in enumerate(are_sparse) if not each]
        sparse = [i for i, each in enumerate(are_sparse) if each]
        with self._counted(indices, lrs, wds, counts):
            self.step(*([values[i] for i in dense] for values in (indices, weights, grads, states)))
            lrs, wds, _ = self._resolve([indices[i] for i in sparse])
            weights, grads, states = ([values[i] for i in sparse] for values in (weights, grads, states))
            kernels.update(weights, grads, states, lrs, wds, self.rule(), fused=True)

    def _carry_out(self, weights: Any, grads: Any, states: Any, lrs: Any, wds: Any, counts: Any, *, fused: bool
                   ) -> None:  # fmt: skip
        is_done = False
        try:
            kernels.update(weights, grads, states, lrs, wds, self.rule(), fused=fused)
            is_done = True
            self._store_counts(counts)
        except BaseException as error:
            if is_done or kernels.came_late(error):
                self._store_counts(counts)  # perhaps once more, which is the same
            raise

    def update_multi_precision(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        """Call :meth:`~adagrad.Optimizer.update`: the kernels handle master copies, nothing is copied.

        For a subclass that overrides a step, :meth:`Optimizer.update_multi_precision` is used, as in MXNet.

        ValueError if ``multi_precision`` is set and a low-precision weight's state has no master copy.
        """
        if self._takes_pairs():
            listed = states if isinstance(indices, (list, tuple)) else [states]
            if self.multi_precision and not (type(listed) is list and set(map(type, listed)) == {tuple}):
                indices, weights, grads, states = as_lists(indices, weights, grads, states)
                require_masters(weights, states)
            self.update(indices, weights, grads, states)
        else:
            super().update_multi_precision(indices, weights, grads, states)

    def _takes_pairs(self) -> bool:
        """Whether :meth:`update` gets low-precision weights, with their master copies in the states."""
        return not (self._overrides("step") or self._overrides("fused_step") or self._overrides("update"))

    def _overrides(self, name: str) -> bool:
        """Whether a subclass, or this object, has a method ``name`` of its own, or the class's has been replaced."""
        return getattr(getattr(self, name), "__func__", None) is not _OURS[name]

    def _may_take_all_at_once(self) -> bool:
        kind: Any = type(self)
        is_ours = kind.__module__ in (__name__, f"{__package__}.group_adagrad") and _names(kind).isdisjoint(vars(self))
        if not is_ours or self._overrides_rates() or any(map(self._overrides, _OURS)):
            return False
        return self._has_our_schedule()

    def _check_known(
        self,
        weights: list[Any],
        grads: list[Any],
        states: list[Any],
        lrs: Any,
        wds: Any,
        *,
        fused: bool,
        wait: bool,
    ) -> None:
        """Check the updates whose states must be ours: a subclass may use others in a step that it overrides."""
        overrides_step, overrides_rows = self._overrides("step"), self._overrides("fused_step")
        which = []
        for i, (weight, grad, state) in enumerate(zip(weights, grads, states, strict=True)):
            is_sparse = fused and kernels.is_row_sparse(grad)
            is_ours = not overrides_rows and (is_sparse or not overrides_step)
            if is_ours or self._is_known(weight, state):
                which.append(i)
        weights, grads, states = ([values[i] for i in which] for values in (weights, grads, states))
        lrs, wds = ([rates[i] for i in which] if len(rates) > 1 else rates for rates in (lrs, wds))
        kernels.check(weights, grads, states, lrs, wds, self.rule(), fused=fused, positions=which, wait=wait)

    def _is_known(self, weight: Any, state: Any) -> bool:
        """Whether a state looks like ours for this weight."""
        w = operand("weight", weight)
        if isinstance(state, (tuple, list)):
            if not (self.multi_precision and w.format in LOW_PRECISION and len(state) == 2):
                return False
            state = state[1]
        if not (isinstance(state, np.ndarray) or is_torch(state)) or (self.row_wise and not w.shape):
            return False
        shape = history_shape(w.shape, row_wise=self.row_wise)
        return tuple(state.shape) == shape and format_of(state) == computing_format(w.format)

    def rule(self) -> Rule:
        """Return the rule's current options and scalars, checked, since attributes may have been set."""
        values = (self.rescale_grad, self.clip_gradient, self.epsilon, self.epsilon_inside, self.decoupled_decay)
        given = (*map(type, values), *values)  # with their types: True equals 1.0, but is refused
        if given != self._rule_given or not self.rescale_grad:  # 0.0 equals -0.0
            self._rule = Rule(
                rescale_grad=checks.finite("rescale_grad", self.rescale_grad),
                clip_gradient=checks.positive_or_none("clip_gradient", self.clip_gradient),
                epsilon=checks.non_negative("epsilon", self.epsilon),
                epsilon_inside=checks.boolean("epsilon_inside", self.epsilon_inside),
                decoupled_decay=checks.boolean("decoupled_decay", self.decoupled_decay),
                row_wise=self.row_wise,
            )
            self._rule_given = () if np.ndarray in map(type, values) else given  # an array may change
        return self._rule

    def _check(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        indices, weights, grads, states = as_lists(indices, weights, grads, states)
        check_indices(indices)
        lrs, wds = self._known_rates(indices)
        self._check_known(weights, grads, states, lrs, wds, fused=self.use_fused_step, wait=False)
        if not self._overrides("update_multi_precision") and not self._takes_pairs():
            check_low_precision(self._with_master(weights), weights, grads, states)

    def _saved(self) -> dict[str, Callable[[str, Any], Any]]:
        return super()._saved() | {
            "epsilon": checks.non_negative,
            "initial_accumulator_value": checks.non_negative,
            "epsilon_inside": checks.boolean,
            "decoupled_decay": checks.boolean,
        }

    def set_config(self, config: Mapping[str, Any]) -> None:
        # Checkpoints from before the dialects lack both options, which were off then.
        super().set_config({"epsilon_inside": False, "decoupled_decay": False} | dict(config))


_OURS = {name: getattr(AdaGrad, name) for name in ("step", "fused_step", "update", "update_multi_precision")}


@functools.cache
def _names(kind: type) -> frozenset[str]:
    return frozenset(dir(kind))
