"""Learning rate, weight decay and update count of each weight."""

from __future__ import annotations

import numbers
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from adagrad import checks
from adagrad.lr_scheduler import LRScheduler, is_ours

Index = int | str
"""Key of a weight in an optimizer."""

ByIndex = Mapping[Any, Any]
"""What is given for each index. A type checker would refuse a ``dict[str, ...]`` for a ``Mapping[Index, ...]``."""

NewCounts = tuple[Mapping[Index, int], int | None]
"""New counts of some weights, and ``num_update`` where a subclass has set it: else it follows from them."""

_KEYS = frozenset([int, str])


class Rates:
    """The part of an optimizer that counts the updates of each weight and determines its lr and wd.

    For the parameters see :class:`~adagrad.Optimizer`.
    """

    def __init__(
        self,
        wd: float,
        learning_rate: float | None,
        lr_scheduler: Callable[[int], float] | None,
        param_idx2name: Mapping[int, str] | None,
        param_dict: ByIndex | None,
        sym: Any,
        begin_num_update: int,
    ) -> None:
        super().__init__()  # for a subclass that has another base class besides
        self.wd = checks.non_negative("wd", wd)
        self.begin_num_update = checks.integer("begin_num_update", begin_num_update, 0)
        for name, value in (("param_idx2name", param_idx2name), ("param_dict", param_dict)):
            if value is not None and not isinstance(value, Mapping):
                raise TypeError(f"{name}={checks.describe(value)}: must be a dict, not {type(value).__name__}")
        check_indices(param_idx2name or (), "a key of param_idx2name")
        self.idx2name: dict[Index, str] = {
            index: checks.string(f"param_idx2name[{index!r}]", name) for index, name in (param_idx2name or {}).items()
        }
        self.param_dict: Mapping[Any, Any] = param_dict if param_dict is not None else {}
        if sym is not None and not all(callable(getattr(sym, name, None)) for name in ("attr_dict", "list_arguments")):
            raise TypeError(f"sym={checks.describe(sym)}: must have attr_dict() and list_arguments()")
        self.sym_info = () if sym is None else (sym.attr_dict(), sym.list_arguments())
        if learning_rate is not None:
            learning_rate = checks.non_negative("learning_rate", learning_rate)
        if lr_scheduler is not None and (isinstance(lr_scheduler, type) or not callable(lr_scheduler)):
            raise TypeError(f"lr_scheduler={checks.describe(lr_scheduler)}: must be callable with num_update, no class")
        self.lr_scheduler = lr_scheduler
        self.lr: float | None = learning_rate
        if lr_scheduler is None and learning_rate is None:
            self.lr = 0.01

        self.num_update = self.begin_num_update
        self._index_update_count: dict[Index, int] = {}
        self._resolved: dict[Index, tuple[float, float]] = {}  # fixed within :meth:`_counted`
        self.lr_mult: dict[Index, float] = {}
        self.wd_mult: dict[Index, float] = {}
        self.set_lr_mult({})
        self.set_wd_mult({})
        if lr_scheduler is not None and learning_rate is not None:  # last: a failing constructor changes nothing
            self._overwrite_base_lr(lr_scheduler, learning_rate)

    @staticmethod
    def _overwrite_base_lr(scheduler: Any, learning_rate: float) -> None:
        if not hasattr(scheduler, "base_lr"):
            warnings.warn(
                f"learning_rate={learning_rate!r} has no effect: the scheduler has no base_lr to overwrite; "
                "pass learning_rate=None",
                UserWarning,
                stacklevel=checks.caller(),
            )
            return
        before = scheduler.base_lr
        if before != learning_rate:
            warnings.warn(
                f"learning_rate={learning_rate!r} overwrites the scheduler's base_lr={before!r}; "
                "pass learning_rate=None to keep the scheduler's",
                UserWarning,
                stacklevel=checks.caller(),
            )
            scheduler.base_lr = learning_rate
        if isinstance(scheduler, LRScheduler):
            scheduler._warmup_final_lr = None  # the warm-up leads to the new base_lr, too

    @property
    def learning_rate(self) -> float:
        """The current learning rate: the scheduler's at ``num_update``, or the one that was set."""
        return self._lr_at(self.num_update)

    def _lr_at(self, num_update: int) -> float:
        if self.lr_scheduler is not None:
            return self.lr_scheduler(num_update)
        return 0.01 if self.lr is None else self.lr

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate; raises UserWarning, as MXNet does, if there is a scheduler."""
        if self.lr_scheduler is not None:
            raise UserWarning(f"lr={lr!r}: the learning rate is set by the optimizer's lr_scheduler")
        self.lr = checks.non_negative("lr", lr)

    def set_lr_mult(self, args_lr_mult: ByIndex) -> None:
        """Replace the learning-rate multipliers, by index or name; those of ``sym`` stay unless given here."""
        self.lr_mult = self._multipliers("args_lr_mult", "__lr_mult__", args_lr_mult)

    def set_wd_mult(self, args_wd_mult: ByIndex) -> None:
        """Replace the weight-decay multipliers, by index or name; those of ``sym`` stay unless given here."""
        self.wd_mult = self._multipliers("args_wd_mult", "__wd_mult__", args_wd_mult)

    def _multipliers(self, argument: str, attribute: str, given: ByIndex) -> dict[Index, float]:
        if not isinstance(given, Mapping):
            raise TypeError(f"{argument}={checks.describe(given)}: must be a dict, not {type(given).__name__}")
        check_indices(given, f"a key of {argument}")
        found: dict[Index, float] = {}
        if self.sym_info:
            attributes, names = self.sym_info
            for name in names:
                if attribute in attributes.get(name, {}):
                    found[name] = _from_text(f"{attribute} of {name}", attributes[name][attribute])
        for index, value in given.items():
            found[index] = checks.non_negative(f"{argument}[{index!r}]", value)
        return found

    def _multiplier(self, index: Index, attribute: str, multipliers: Mapping[Index, float]) -> float:
        """Return the multiplier in MXNet's order: ``param_dict``, then by index, then by name."""
        if index in self.param_dict:
            return _parameters_multiplier(index, self.param_dict[index], attribute)
        key = index if index in multipliers else self.idx2name.get(index, index)
        value = multipliers.get(key, 1.0)
        return value if checks.is_rate(value) else checks.non_negative(f"{attribute}[{key!r}]", value)

    def _get_lr(self, index: Index) -> float:
        """Return the current learning rate of the weight ``index``.

        Subclasses may override this or :meth:`_get_lrs`, which this calls, as in MXNet.
        """
        return self._get_lrs([index])[0]

    def _get_wd(self, index: Index) -> float:
        """Return the weight decay of the weight ``index``; subclasses may override this or :meth:`_get_wds`."""
        return self._get_wds([index])[0]

    def _get_lrs(self, indices: Sequence[Index]) -> list[float]:
        fixed = self._resolved
        return [fixed[index][0] if index in fixed else self._current_lr(index) for index in indices]

    def _current_lr(self, index: Index) -> float:
        name = "lr" if self.lr_scheduler is None else f"lr_scheduler({self.num_update})"
        return checks.non_negative(name, self.learning_rate) * self._multiplier(index, "lr_mult", self.lr_mult)

    def _get_wds(self, indices: Sequence[Index]) -> list[float]:
        wd = checks.non_negative("wd", self.wd)
        return [wd * self._multiplier(index, "wd_mult", self.wd_mult) for index in indices]

    # ------------------------------------------------------------------------------------------------------- the counts

    def _update_count(self, index: Index | Sequence[Index]) -> None:
        """Count an update of the weight ``index``, or of each in a list; for ``step`` methods of subclasses."""
        for each in index if isinstance(index, (list, tuple)) else (index,):
            if each not in self._resolved:
                count = self._index_update_count.get(each, self.begin_num_update) + 1
                self._index_update_count[each] = count
                self.num_update = max(self.num_update, count)

    def _resolve(self, indices: Sequence[Index]) -> tuple[list[float], list[float], NewCounts]:
        """Return lr and wd of each index (or one for all), in order, and the new counts, without changing anything."""
        fixed = self._resolved
        if fixed:  # called by a step within another one, perhaps with some indices of its own
            other = [index for index in indices if index not in fixed]
            lrs, wds, new = self._resolve_now(other) if other else ([], [], ({}, None))
            rates = fixed | dict(zip(other, _pairs(lrs, wds, len(other)), strict=True))
            return [rates[index][0] for index in indices], [rates[index][1] for index in indices], new
        return self._resolve_now(indices)

    def _resolve_now(self, indices: Sequence[Index]) -> tuple[list[float], list[float], NewCounts]:
        counts, begin, reached = self._index_update_count, self.begin_num_update, self.num_update
        if not (type(begin) is type(reached) is int and begin >= 0 <= reached):
            begin = checks.integer("begin_num_update", begin, 0)
            reached = checks.integer("num_update", reached, 0)
        if not _KEYS.issuperset(map(type, indices)):
            check_indices(indices)
        if self._overrides_rates():
            return self._ask(indices)
        if self.lr_scheduler is None and not (self.param_dict or self.lr_mult or self.wd_mult):
            lr, wd = checks.non_negative("lr", self._lr_at(reached)), checks.non_negative("wd", self.wd)
            return [lr], [wd], ({index: counts.get(index, begin) + 1 for index in indices}, None)
        if not self._has_our_schedule():
            return self._ask(indices)
        new, lrs, base = {}, [], None
        for index in indices:
            new[index] = counts.get(index, begin) + 1
            if base is None or new[index] > reached:
                reached = max(reached, new[index])
                name = "lr" if self.lr_scheduler is None else f"lr_scheduler({reached})"
                base = checks.non_negative(name, self._lr_at(reached))
            lrs.append(base * self._multiplier(index, "lr_mult", self.lr_mult))
        return _checked("lr", indices, lrs), _checked("wd", indices, self._get_wds(indices)), (new, None)

    def _known_rates(self, indices: Sequence[Index]) -> tuple[list[float], list[float]]:
        """Return lr and wd for checks in advance. Code of users may have state, so it is not asked here.

        Where a subclass determines the rates, they are 0; where only the schedule is a user's, lr is the multiplier.
        """
        if self._overrides_rates():
            return [0.0], [0.0]
        if self._has_our_schedule():
            return self._resolve(indices)[:2]
        lrs = [self._multiplier(index, "lr_mult", self.lr_mult) for index in indices]
        return lrs, _checked("wd", indices, self._get_wds(indices))

    def _overrides_rates(self) -> bool:
        """Whether a subclass overrides learning rates, weight decays or counts."""
        return bool(_overridable(type(self)) != _OURS)

    def _has_our_schedule(self) -> bool:
        """Whether the scheduler, if any, is one of :mod:`adagrad.lr_scheduler`: others may have state of their own."""
        return self.lr_scheduler is None or is_ours(self.lr_scheduler)

    def _ask(self, indices: Sequence[Index]) -> tuple[list[float], list[float], NewCounts]:
        """Do :meth:`_resolve` through code of users: each index is counted before its rates, as in MXNet."""
        counts, before = self._index_update_count, self._counts_of(indices)
        lrs: list[float] = []
        wds: list[float] = []
        try:
            for index in indices:
                self._update_count(index)
                lrs.append(checks.non_negative(f"lr of index {index!r}", self._get_lr(index)))
                wds.append(checks.non_negative(f"wd of index {index!r}", self._get_wd(index)))
            return lrs, wds, ({index: counts[index] for index in indices if index in counts}, self.num_update)
        finally:
            self._restore(before)

    def _counts_of(self, indices: Sequence[Index]) -> tuple[dict[Index, int | None], int]:
        """Return the counts of some weights (None for no count) and ``num_update``, for :meth:`_restore`."""
        return {index: self._index_update_count.get(index) for index in indices}, self.num_update

    def _restore(self, before: tuple[dict[Index, int | None], int]) -> None:
        counts, self.num_update = before
        for index, count in counts.items():
            if count is None:
                self._index_update_count.pop(index, None)
            else:
                self._index_update_count[index] = count

    def _store_counts(self, new: NewCounts) -> None:
        """Store the counts that :meth:`_resolve` returned."""
        counts, reached = new
        self._index_update_count.update(counts)
        if reached is not None:
            self.num_update = reached
        elif counts:  # of another thread, it may have grown since
            self.num_update = max(self.num_update, *counts.values())

    @contextmanager
    def _counted(
        self, indices: Sequence[Index], lrs: Sequence[float], wds: Sequence[float], new: NewCounts
    ) -> Iterator[None]:
        """Context in which the indices are counted and their lr and wd fixed, whatever a called ``step`` resolves.

        The counts are restored if it raises.
        """
        before = self._counts_of(indices)
        self._store_counts(new)
        self._resolved = dict(zip(indices, _pairs(lrs, wds, len(indices)), strict=True))
        try:
            yield
        except Exception:
            self._restore(before)
            raise
        finally:
            self._resolved = {}


_overridable = operator.attrgetter("learning_rate", "_get_lr", "_get_lrs", "_get_wd", "_get_wds", "_update_count")
_OURS = _overridable(Rates)


def _checked(name: str, indices: Sequence[Index], rates: list[float]) -> list[float]:
    """Return the rates; ValueError for the first that is not finite and >= 0."""
    if not all(map(checks.is_rate, rates)):
        for index, rate in zip(indices, rates, strict=True):
            checks.non_negative(f"{name} of index {index!r}", rate)
    return rates


def _pairs(lrs: Sequence[float], wds: Sequence[float], count: int) -> list[tuple[float, float]]:
    """Return lr and wd of each of ``count`` weights, from lists of as many or of one for all."""
    return [(lrs[0], wds[0])] * count if len(lrs) == 1 else list(zip(lrs, wds, strict=True))


def _from_text(name: str, value: Any) -> float:
    """Convert a multiplier from a symbol's attributes, usually text."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={checks.describe(value)}: must be a number") from None
    return checks.non_negative(name, number)


def _parameters_multiplier(index: Index, parameter: Any, attribute: str) -> float:
    try:
        value = getattr(parameter, attribute)
    except AttributeError:
        shown = checks.describe(parameter)
        raise TypeError(f"param_dict[{index!r}]={shown}: must have lr_mult and wd_mult") from None
    return value if checks.is_rate(value) else checks.non_negative(f"{attribute} of param_dict[{index!r}]", value)


def check_indices(indices: Iterable[Any], name: str = "index") -> None:
    """Raise TypeError unless all are integers or strings, which a checkpoint can hold."""
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, (str, numbers.Integral)):
            kind = type(index).__name__
            raise TypeError(f"{name}={checks.describe(index)}: must be an integer or a string, not {kind}")
