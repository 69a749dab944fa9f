"""AdaGrad as a ``torch.optim.Optimizer``, a drop-in replacement for ``torch.optim.Adagrad``."""

from __future__ import annotations

import itertools
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from adagrad import checks, dialects
from adagrad.dialects import default
from adagrad.kernels.names import Names, of_parameter
from adagrad.torch_compiler import apart_from_compiler
from adagrad.torch_hooks import wrapped_where_needed
from adagrad.torch_options import RULE, check_options
from adagrad.torch_state import as_saved, fitted, new_state
from adagrad.torch_step import Part, Snapshot, update, update_differentiably

__all__ = ["Adagrad", "check_row_ids"]


def check_row_ids(device: torch.device | str | int | None = None) -> None:
    """Synchronise one CUDA device, or all, and raise any pending row-id error, for example after the last step.

    An update does not wait for the check of its row ids. If one is out of range, it changes nothing, and a later update
    or this function raises. This also covers the optimizers of :mod:`adagrad`.

    Raises
    ------
    IndexError
        If an update found a row id outside its weight.
    """
    used = sys.modules.get("adagrad.kernels.cuda")
    if used is not None:
        used.check(device)


class Adagrad(Optimizer):
    r"""AdaGrad with the arguments, state and checkpoints of ``torch.optim.Adagrad``, using this library's kernels.

    .. math::

        g &= \mathrm{clip}(\pm g,\ \pm\mathtt{clip\_value}) + \mathtt{weight\_decay} \cdot w \\
        h &= h + g^2 \\
        w &= w - \frac{\mathtt{lr}}{1 + (t - 1)\,\mathtt{lr\_decay}} \cdot \frac{g}{\sqrt{h} + \mathtt{eps}}

    with parameter :math:`w`, gradient :math:`g` (negated by ``maximize``), history :math:`h` and the parameter's step
    count :math:`t`. Operations are rounded individually, in this order, in float64 for float64 parameters and in
    float32 for all others; complex numbers are treated as pairs of real ones.

    Sparse COO gradients, as from ``nn.Embedding(sparse=True)``, are not coalesced: duplicate rows are summed in their
    order, and only the rows present are updated, also by ``weight_decay``. There are kernels for CPU and CUDA; on other
    devices, for tensor subclasses, and on CUDA for memory with gaps, PyTorch's own operations compute the rule.

    Parameters
    ----------
    params : iterable
        Parameters, pairs of name and parameter, or dicts of parameter groups.
    lr : float or Tensor, default 1e-2
        Learning rate; a tensor has one element.
    lr_decay : float, default 0
    weight_decay : float, default 0
        Added to the gradient as ``weight_decay * w``.
    initial_accumulator_value : float, default 0
        Initial history; may differ between groups.
    eps : float, default 1e-10
    foreach, fused : bool, optional
        Accepted for compatibility; neither changes results or kernels. With ``fused=True``, as in PyTorch, step counts
        are on the parameters' device and, under ``torch.amp.GradScaler``, the kernels unscale, and skip steps without
        waiting for the device; otherwise GradScaler unscales.
    maximize : bool, default False
    differentiable : bool, default False
        Whether autograd records the step, for non-leaf parameters. Slow.
    clip_value : float, optional
        Gradients are clipped to ``[-clip_value, clip_value]`` before weight decay is added. Finite, > 0.
    row_wise : bool, default False
        Whether histories have one value per row, to which the mean of the row's squares is added. ``sum`` then has
        shape ``(n, 1, ...)``.
    multi_precision : bool, default False
        Whether to keep a float32 copy of float16 and bfloat16 parameters, ``master`` in the state, to which the rule is
        applied; the parameter is its rounding. Where something else changed the parameter in place, the next step takes
        its values; it then compares all of the parameter, which it does at every step after
        ``nn.Embedding(max_norm=...)`` and for parameters made in inference mode. PyTorch does not count changes through
        ``p.data``, NumPy or DLPack, by in-place collectives, of a DTensor's local part, of a DTensor by
        ``torch._foreach_*`` or by another process: delete ``master`` from the state after those.
    dialect : str, default "torch"
        The framework to follow, one of :data:`~adagrad.dialects.DIALECTS`. Its defaults apply to every argument not
        passed.
    epsilon_inside : bool, default that of the dialect
        Divide by :math:`\sqrt{h + \mathtt{eps}}` instead.
    decoupled_decay : bool, default that of the dialect
        Apply weight decay separately from the gradient, so that it does not enter the history:
        ``w -= lr * (g / divisor + weight_decay * w)``.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or value; the message names it.
    RuntimeError
        If ``fused`` is combined with ``foreach`` or ``differentiable``, as in PyTorch.

    Notes
    -----
    The state of a parameter is ``step`` (a one-element tensor) and ``sum`` (the history, float32 for float16 and
    bfloat16 parameters; torch.optim.Adagrad rounds it when loading).

    References
    ----------
    Duchi, Hazan, Singer: Adaptive Subgradient Methods for Online Learning and Stochastic Optimization.
    JMLR 12, 2011, figure 1 (diagonal case).

    Examples
    --------
    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(3))
    >>> optimizer = Adagrad([weight], lr=0.5)
    >>> weight.grad = torch.tensor([1.0, -2.0, 0.0])
    >>> optimizer.step()
    >>> weight.tolist()
    [0.5, 1.5, 1.0]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = default(1e-2),
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = default(0),
        eps: float = default(1e-10),
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        clip_value: float | None = None,
        row_wise: bool = False,
        multi_precision: bool = False,
        dialect: str = "torch",
        epsilon_inside: bool | None = None,
        decoupled_decay: bool | None = None,
    ) -> None:
        preset = dialects.find(dialect)
        lr, eps, initial_accumulator_value = preset.numbers(lr, eps, initial_accumulator_value, row_wise)
        epsilon_inside, decoupled_decay = preset.options(epsilon_inside, decoupled_decay)
        lr = 0.01 if lr is None else lr
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
            "clip_value": clip_value,
            "row_wise": row_wise,
            "multi_precision": multi_precision,
            "epsilon_inside": epsilon_inside,
            "decoupled_decay": decoupled_decay,
        }
        check_options(defaults)
        self._snapshots: dict[int, Snapshot | None] = {}
        super().__init__(params, defaults)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether `step` uses the attributes grad_scale and found_inf; read by GradScaler and by trainers."""
        return bool(self.defaults["fused"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with its own options, and create their state."""
        if isinstance(param_group, dict):
            if "dialect" in param_group:
                why = "must be passed to the optimizer; a group can set its options, such as eps and epsilon_inside"
                raise ValueError(f"dialect={param_group['dialect']!r} of a parameter group: {why}")
            check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            # As in PyTorch, a parameter that is added again keeps its state.
            self.state.update({p: new_state(p, group) for p in group["params"] if not self.state.get(p)})
        except Exception:
            self.param_groups.pop()
            raise

    def share_memory(self) -> None:
        """Move the histories, and master copies, to shared memory."""
        for group in self.param_groups:
            for p in group["params"]:
                for name in ("sum", "master"):
                    if name in self.state[p]:
                        self.state[p][name].share_memory_()

    # --------------------------------------------------------------------------------------------------------- the step

    profile_hook_step = staticmethod(wrapped_where_needed)
    """PyTorch applies it to `step`, once per class."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Parameters
        ----------
        closure : callable, optional
            Reevaluates the model and returns the loss, which this method returns.

        Raises
        ------
        TypeError, ValueError, IndexError
            If a parameter cannot be updated; nothing is changed. The message gives its name, or its position among the
            parameters of all groups. (If a tensor subclass itself raises, earlier parameters of such classes may have
            changed.) On CUDA a row id outside its parameter makes the step a no-op, and a later step, or
            :func:`check_row_ids`, raises; this step itself, after waiting, if it updates several devices or what the
            CUDA kernels do not take.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.defaults["differentiable"]:
            with torch.enable_grad():
                self._update()
        else:
            self._update()
        return loss

    @apart_from_compiler
    def _update(self) -> None:
        parts, first, differentiable = list[Part](), 0, self.defaults["differentiable"]
        for group, states in zip(self.param_groups, self._states(), strict=True):
            parts.append(Part(group, states, first, self._snapshots, self._names_at, differentiable=differentiable))
            first += len(group["params"])
        if len(self._snapshots) > first:  # those of parameters that were replaced
            kept = {id(p) for group in self.param_groups for p in group["params"]}
            for other in self._snapshots.keys() - kept:
                del self._snapshots[other]
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None:  # GradScaler sets the number 0 if no parameter here has a gradient
            found_inf = torch.as_tensor(found_inf).reshape(())
        if found_inf is not None and not (found_inf.is_cuda and all(part.on_cuda() for part in parts)):
            if bool(found_inf):
                return
            found_inf = None
        if differentiable:
            update_differentiably(parts)
        else:
            update(parts, grad_scale, found_inf)

    def _names_at(self, k: int) -> Names:
        """What messages call the ``k``-th parameter, counted through the groups."""
        called = [group.get("param_names") or () for group in self.param_groups]
        if any(len(names) != len(group["params"]) for names, group in zip(called, self.param_groups, strict=True)):
            return of_parameter(k)
        return of_parameter(k, [*itertools.chain(*called)][k])

    def _states(self) -> list[list[dict[str, Any]]]:
        """Return the states of each group's parameters."""
        groups = self.param_groups
        params = groups[0]["params"] if len(groups) == 1 else [p for group in groups for p in group["params"]]
        # The states are usually in the parameters' order. Looking them up costs more: tensors are hashed in Python.
        states = list(self.state.values())
        if len(params) != len(states) or not all(map(operator.is_, self.state, params)) or not all(states):
            states = [self._state_of(p, group) for group in groups for p in group["params"]]
        if len(groups) == 1:
            return [states]
        rest = iter(states)
        return [list(itertools.islice(rest, len(group["params"]))) for group in groups]

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Return the state of a parameter, a new one if it has a gradient but no state."""
        state: dict[str, Any] = self.state.get(p, {})
        if not state and p.grad is not None:
            state = self.state[p] = new_state(p, group)
        return state

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by this class or ``torch.optim.Adagrad``; options that it lacks keep their values.

        A state saved by the latter sets PyTorch's rule, whatever the dialect here.

        Raises
        ------
        TypeError, ValueError
            If the groups differ from these or are another optimizer's, an option is invalid, or a state has another
            type or shape; nothing is changed.
        """
        if not isinstance(state_dict, Mapping):  # before PyTorch copies it
            raise TypeError(f"state_dict={checks.describe(state_dict)}: must be what state_dict() returns")
        hooks = self._optimizer_load_state_dict_pre_hooks

        def in_order(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            self._optimizer_load_state_dict_pre_hooks = hooks  # hooks may remove themselves, or load
            for hook in list(hooks.values()):
                changed = hook(self, given)
                given = given if changed is None else changed
            return as_saved(given)  # last, to see the dict as the hooks left it

        self._optimizer_load_state_dict_pre_hooks = OrderedDict({0: in_order})
        try:
            super().load_state_dict(state_dict)
        finally:
            self._optimizer_load_state_dict_pre_hooks = hooks

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = self.__dict__.get("param_groups")
        for i, group in enumerate(state.get("param_groups", [])):
            if not before or "lr_decay" in group:  # else the group has no options, as in a partial checkpoint
                for name in RULE:
                    group.setdefault(name, False)
            for name, value in (self.defaults if before else state["defaults"]).items():
                group.setdefault(name, before[i].get(name, value) if before else value)
            if not before:
                continue  # a copy, or unpickled: everything stays as it is
            check_options(group, are_loaded=True)
            for k, p in enumerate(group["params"]):
                loaded = state.get("state", {}).get(p)
                if loaded:
                    state["state"][p] = fitted(f"state of parameter {k} of group {i}", p, loaded, group)
        super().__setstate__(state)
        self._snapshots = {}
