"""The optimizer base class: hyper-parameters, update steps, checkpoints and the registry.

``from adagrad import optimizer`` may take the place of ``from mxnet import optimizer``: the other names are found, too.
"""

from __future__ import annotations

import copyreg
import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, TypeVar

import numpy as np

from adagrad import checks, saved_schedules
from adagrad.arguments import as_lists, cast_gradient, check_low_precision
from adagrad.arrays import LOW_PRECISION, operand
from adagrad.lr_scheduler import is_ours
from adagrad.rates import ByIndex, Index, Rates
from adagrad.rule import Array, cast, is_torch

O = TypeVar("O", bound="type[Optimizer]")  # noqa: E741


class Options(TypedDict, total=False):
    """The arguments of :class:`Optimizer` that its subclasses forward to it."""

    rescale_grad: float
    param_idx2name: Mapping[int, str] | None
    wd: float
    clip_gradient: float | None
    lr_scheduler: Callable[[int], float] | None
    sym: Any
    begin_num_update: int
    multi_precision: bool
    param_dict: ByIndex | None
    aggregate_num: float | None


class Optimizer(Rates):
    """Base class of optimizers, with the API of ``mxnet.optimizer.Optimizer`` (2.0).

    A subclass defines :meth:`create_state`, :meth:`step` and, if it has kernels, :meth:`fused_step`.

    Parameters
    ----------
    rescale_grad : float, default 1.0
        Factor applied to gradients first; often ``1 / batch_size``. Finite, of any sign.
    param_idx2name : dict of int to str, optional
        Maps indices to names, by which multipliers can be set.
    wd : float, default 0.0
        Weight decay: ``wd * weight`` is added to the gradient. Finite, >= 0.
    clip_gradient : float, optional
        Gradients are clipped to ``[-clip_gradient, clip_gradient]``, before weight decay is added. Finite, > 0.
    learning_rate : float, optional
        If given, overwrites the ``base_lr`` of ``lr_scheduler``. If None, the scheduler's is used, or 0.01 without one.
    lr_scheduler : callable, optional
        The learning rate as a function of ``num_update``; see :mod:`adagrad.lr_scheduler`.
    sym : object, optional
        An object with ``attr_dict()`` and ``list_arguments()``; ``__lr_mult__`` and ``__wd_mult__`` of its arguments
        become multipliers.
    begin_num_update : int, default 0
        The initial update count of every weight.
    multi_precision : bool, default False
        Whether to keep a float32 master copy of float16 and bfloat16 weights, to which the rule is applied. The next
        update overwrites what others write to such a weight; after loading weights, load their states or create them.
    param_dict : mapping of index to object, optional
        Objects with ``lr_mult`` and ``wd_mult``, read at every step; they override all other multipliers.
    aggregate_num : int or numpy.inf, optional
        How many weights :class:`~adagrad.Updater` passes to one step; 1 by default. The results are the same. It passes
        all at once where no user-defined subclass, attribute or scheduler could see the difference; multipliers are
        then read before any weight changes.
    use_fused_step : bool, optional
        Whether :meth:`update` calls :meth:`fused_step` rather than :meth:`step`; False by default in this class.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or value; the message names it.

    Attributes
    ----------
    learning_rate : float
        The current learning rate.
    num_update : int
        The largest number of updates of any weight.
    """

    opt_registry: ClassVar[dict[str, type[Optimizer]]] = {}

    def __init__(
        self,
        rescale_grad: float = 1.0,
        param_idx2name: Mapping[int, str] | None = None,
        wd: float = 0.0,
        clip_gradient: float | None = None,
        learning_rate: float | None = None,
        lr_scheduler: Callable[[int], float] | None = None,
        sym: Any = None,
        begin_num_update: int = 0,
        multi_precision: bool = False,
        param_dict: ByIndex | None = None,
        aggregate_num: float | None = None,
        use_fused_step: bool | None = None,
    ) -> None:
        self.rescale_grad = checks.finite("rescale_grad", rescale_grad)
        self.clip_gradient = checks.positive_or_none("clip_gradient", clip_gradient)
        self.multi_precision = checks.boolean("multi_precision", multi_precision)
        self.use_fused_step = use_fused_step is not None and checks.boolean("use_fused_step", use_fused_step)
        self.aggregate_num = _aggregate_num(aggregate_num)
        super().__init__(wd, learning_rate, lr_scheduler, param_idx2name, param_dict, sym, begin_num_update)

    # ----------------------------------------------------------------------------------------------------- the registry

    @staticmethod
    def register(klass: O) -> O:
        """Register a class for :meth:`create_optimizer`, under its name in lower case; a class decorator."""
        if not isinstance(klass, type):
            raise TypeError(f"klass={checks.describe(klass)}: must be a class")
        name = klass.__name__.lower()
        known = Optimizer.opt_registry.get(name)
        if known is not None and known is not klass:
            warnings.warn(
                f"optimizer {klass.__module__}.{klass.__qualname__} replaces {known.__module__}.{known.__qualname__}",
                UserWarning,
                stacklevel=checks.caller(),
            )
        Optimizer.opt_registry[name] = klass
        return klass

    @staticmethod
    def create_optimizer(name: str, **kwargs: Any) -> Optimizer:
        """Create the registered optimizer ``name``, in any case, with ``kwargs``; ValueError if it is unknown."""
        klass = Optimizer.opt_registry.get(checks.string("name", name).lower())
        if klass is None:
            known = ", ".join(sorted(Optimizer.opt_registry))
            raise ValueError(f"name={name!r}: no such optimizer; registered: {known}")
        return klass(**kwargs)

    # -------------------------------------------------------------------------------------------------------- the steps

    def create_state(self, index: Index, weight: Array) -> Any:
        """Create the initial state of ``weight``; None in this class."""
        return None

    def create_state_multi_precision(self, index: Index, weight: Array) -> Any:
        """Create the state; with ``multi_precision``, (float32 master copy, state) for a low-precision weight."""
        w = operand("weight", weight)
        if not (self.multi_precision and w.format in LOW_PRECISION):
            return self.create_state(index, weight)
        master = weight.detach().float() if is_torch(weight) else w.array.astype("float32")
        return master, self.create_state(index, master)

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        """Update each weight once by array expressions; to be defined by a subclass."""
        raise NotImplementedError(f"{type(self).__name__} must define step")

    def fused_step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        """Update each weight once by kernels; to be defined by a subclass."""
        raise NotImplementedError(f"{type(self).__name__} must define fused_step")

    def update(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        """Update weights in place, by :meth:`fused_step` if ``use_fused_step``, else by :meth:`step`.

        Parameters
        ----------
        indices : int or str, or a list of them
            Keys of the weights, for counts and multipliers; unique within a call.
        weights : array, or a list of arrays
            NumPy arrays or torch tensors of any shape and strides; float16, bfloat16, float32 or float64. Updated in
            place.
        grads : array, RowSparse or sparse COO tensor, or a list of them
            Each with its weight's shape and dtype, or float32 for a float16 or bfloat16 weight. Never modified.
        states : result of :meth:`create_state_multi_precision`, or a list of them
            Updated in place.

        Raises
        ------
        TypeError, ValueError, IndexError
            If an argument is invalid; the message names it, and nothing is changed. On CUDA a row id out of range makes
            the call a no-op, and a later call or :func:`adagrad.torch.check_row_ids` raises; if this call spans several
            devices, or has arrays that the CUDA kernels cannot take, it waits and raises itself.
        MemoryError
            No memory is left. Of several row-sparse or strided weights, some may be updated; none is counted.
        """
        if not isinstance(indices, (list, tuple)):
            indices, weights, grads, states = [indices], [weights], [grads], [states]
        if self.use_fused_step:
            self.fused_step(indices, weights, grads, states)
        else:
            self.step(indices, weights, grads, states)

    def update_multi_precision(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        """Update weights whose states may hold master copies: :meth:`update` gets these in place of the weights.

        For subclasses that do not handle low precision; the low-precision weight becomes the rounded master copy.
        """
        indices, weights, grads, states = as_lists(indices, weights, grads, states)
        low = self._with_master(weights)
        check_low_precision(low, weights, grads, states)
        masters, full, inner = [*weights], [*grads], [*states]
        for i in low:
            masters[i], inner[i] = states[i]
            full[i] = cast_gradient(grads[i], masters[i])
        self.update(indices, masters, full, inner)
        for i in low:
            with np.errstate(all="ignore"):  # overflow and underflow round as in the kernels
                operand("weight", weights[i]).array[...] = cast(masters[i], weights[i])

    def _with_master(self, weights: list[Any]) -> list[int]:
        """Return the positions of the weights that have a master copy."""
        if not self.multi_precision:
            return []
        return [i for i, w in enumerate(weights) if operand(f"weights[{i}]", w).format in LOW_PRECISION]

    def _may_take_all_at_once(self) -> bool:
        """Whether one step for all weights equals several: no user-defined code runs in a step."""
        return False

    def _check(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        """Raise the errors that an update with these lists would raise; for callers that split a list into updates."""

    def __repr__(self) -> str:
        rate = {"learning_rate": self.lr} if self.lr_scheduler is None else {"lr_scheduler": self.lr_scheduler}
        shown = {**rate, **{name: getattr(self, name) for name in self._saved()}, "num_update": self.num_update}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def config(self) -> dict[str, Any]:
        """Return hyper-parameters and counts as plain data, for checkpoints.

        It does not contain a custom scheduler, ``param_dict`` or ``sym``, nor the options that change no result
        (``aggregate_num``, ``use_fused_step``). A subclass with hyper-parameters of its own adds them, as in
        ``super().config() | {"momentum": self.momentum}``, and overrides :meth:`set_config` to read them.

        Raises
        ------
        ValueError
            If an attribute, also of the scheduler, was set to a value that the constructor refuses: it could not be
            loaded.
        """
        scheduler: Any = self.lr_scheduler
        if scheduler is not None:
            scheduler = [type(scheduler).__name__, scheduler.config()] if is_ours(scheduler) else "custom"
        config = {
            "class": type(self).__name__,
            "lr": self.lr,
            "lr_scheduler": scheduler,
            "num_update": self.num_update,
            "index_update_count": dict(self._index_update_count),
            **{name: getattr(self, name) for name in self._saved()},
            **{name: dict(getattr(self, name)) for name in ("lr_mult", "wd_mult", "idx2name")},
        }
        try:
            self._checked(config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"optimizer {type(self).__name__}: cannot be saved: {error}") from error
        return config

    def _saved(self) -> dict[str, Callable[[str, Any], Any]]:
        """Names of the attributes saved in checkpoints, with their checks."""
        return {
            "rescale_grad": checks.finite,
            "wd": checks.non_negative,
            "clip_gradient": checks.positive_or_none,
            "begin_num_update": lambda name, value: checks.integer(name, value, 0),
            "multi_precision": checks.boolean,
        }

    def set_config(self, config: Mapping[str, Any]) -> None:
        """Restore what :meth:`config` of an optimizer of the same class returned.

        A custom scheduler here is kept, whatever was saved. If the saved optimizer had a custom scheduler and this one
        has none, the learning rate is kept, with a UserWarning. ValueError if it does not fit; nothing is changed.
        """
        if config.get("class") != type(self).__name__:
            raise ValueError(f"optimizer {config.get('class')!r}: must be {type(self).__name__!r}, as here")
        try:
            new = self._checked(config)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"optimizer {type(self).__name__}: its saved hyper-parameters: {error!r}") from error
        here = self.lr_scheduler
        if here is not None and not is_ours(here):
            new["lr_scheduler"] = here
        elif config["lr_scheduler"] == "custom" and here is None:
            del new["lr"]  # meaningless without the saved optimizer's scheduler
            warnings.warn(
                "the saved optimizer used a custom scheduler, which state files do not contain: keeping "
                f"learning_rate={self.learning_rate!r}; set lr_scheduler to continue the schedule",
                UserWarning,
                stacklevel=checks.caller(),
            )
        for name, value in new.items():
            setattr(self, name, value)

    def _checked(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the checked attributes in ``config``, which does not contain a custom scheduler.

        KeyError, TypeError, ValueError or AttributeError if it does not fit.
        """
        new = {name: check(name, config[name]) for name, check in self._saved().items() if name in config}
        new["lr"] = None if config["lr"] is None else checks.non_negative("lr", config["lr"])
        new["num_update"] = checks.integer("num_update", config["num_update"], 0)
        counts = config["index_update_count"]
        new["_index_update_count"] = {k: checks.integer(f"count of {k!r}", v, 0) for k, v in counts.items()}
        for name in ("lr_mult", "wd_mult"):
            new[name] = {k: checks.non_negative(f"{name}[{k!r}]", v) for k, v in config[name].items()}
        new["idx2name"] = {k: checks.string(f"idx2name[{k!r}]", v) for k, v in config["idx2name"].items()}
        schedule = config["lr_scheduler"]
        if schedule != "custom":
            new["lr_scheduler"] = None if schedule is None else saved_schedules.from_config(*schedule)
            reached = [new["num_update"], new.get("begin_num_update", 0), *new["_index_update_count"].values()]
            saved_schedules.require_reachable(new["lr_scheduler"], max(reached) + 1)
        return new

    def __getstate__(self) -> Any:
        # As in MXNet: param_dict holds the model's parameters, so a copy or unpickled object must be given its own.
        state = {**vars(self), "param_dict": {}}
        names: list[str] = copyreg._slotnames(type(self))  # type: ignore[attr-defined]
        slots = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return (state, slots) if slots else state

    def __setstate__(self, state: Any) -> None:
        attributes, slots = state if isinstance(state, tuple) else (state, {})
        vars(self).update(attributes, param_dict={})
        for name, value in slots.items():
            setattr(self, name, value)


def _aggregate_num(value: Any) -> float:
    if value is None:
        return 1
    if isinstance(value, float) and value == math.inf:
        return math.inf
    return checks.integer("aggregate_num", value, 1)


register = Optimizer.register
create = Optimizer.create_optimizer


if TYPE_CHECKING:
    from adagrad.adagrad import AdaGrad as AdaGrad
    from adagrad.group_adagrad import GroupAdaGrad as GroupAdaGrad
    from adagrad.updater import Updater as Updater, get_updater as get_updater
else:

    def __getattr__(name: str) -> Any:
        if name in ("AdaGrad", "GroupAdaGrad", "Updater", "get_updater"):  # their modules import this one
            import adagrad

            return getattr(adagrad, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
