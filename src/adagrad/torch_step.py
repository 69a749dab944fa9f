"""What a step of :class:`adagrad.torch.Adagrad` is made of."""

from __future__ import annotations

import functools
import itertools
import operator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from adagrad import checks
from adagrad import rule as expression
from adagrad.kernels.batch import Batch
from adagrad.kernels.counts import Counts
from adagrad.rule import Rule
from adagrad.torch_state import master

_grad_of, _sum_of, _step_of = operator.attrgetter("grad"), operator.itemgetter("sum"), operator.itemgetter("step")
_rule_of = operator.itemgetter("maximize", "clip_value", "eps", "epsilon_inside", "decoupled_decay", "row_wise")


@functools.lru_cache(maxsize=64, typed=True)
def _rule(maximize: bool, clip_value: Any, eps: Any, inside: bool, decoupled: bool, row_wise: bool) -> Rule:
    """The rule of a group with these options."""
    return Rule(
        rescale_grad=-1.0 if maximize else 1.0,
        clip_gradient=checks.positive_or_none("clip_value", clip_value),
        epsilon=checks.non_negative("eps", eps),
        epsilon_inside=inside,
        decoupled_decay=decoupled,
        row_wise=row_wise,
    )


class Part:
    """The parameters of a group that have gradients, with their gradients, states and rates."""

    def __init__(self, defaults: dict[str, Any], group: dict[str, Any], states: list[dict[str, Any]]) -> None:
        self.params: list[Tensor] = list(group["params"])
        self.grads: list[Any] = list(map(_grad_of, self.params))
        self.states = states
        if any(map(operator.is_, self.grads, itertools.repeat(None))):
            present = [i for i, grad in enumerate(self.grads) if grad is not None]
            self.params, self.states = [self.params[i] for i in present], [states[i] for i in present]
            self.grads = [self.grads[i] for i in present]
        self.histories = list(map(_sum_of, self.states))
        self.masters: list[Tensor | None] = []
        if group["multi_precision"]:
            self.masters = [master(p, state) for p, state in zip(self.params, self.states, strict=True)]
        self.counts = Counts(list(map(_step_of, self.states)))
        self.rule = _rule(*_rule_of(group))
        self.wd = checks.non_negative("weight_decay", group["weight_decay"])
        self.lrs = self._lrs(group["lr"], group["lr_decay"], keep_tensor=defaults["differentiable"])

    def on_cuda(self) -> bool:
        return all(p.is_cuda for p in self.params)

    def _lrs(self, lr: Any, decay: Any, *, keep_tensor: bool) -> list[Any]:
        """The learning rate of each parameter, or one for all; a tensor where the host need not know it."""
        if isinstance(lr, Tensor):
            keep_tensor = keep_tensor or (lr.is_cuda and self.on_cuda())
            lr = lr.reshape(()) if keep_tensor else float(lr)
        if not isinstance(lr, Tensor):
            # Its sign was checked at first; a schedule that crosses zero by a rounding error is no reason to stop.
            lr = checks.finite("lr", lr)
        decay = checks.non_negative("lr_decay", decay)
        if decay == 0 or not self.params:
            return [lr]
        return [lr / (1 + count * decay) for count in self.counts.values(wait=not self.on_cuda())]

    def commit(self, found_inf: Tensor | None) -> None:
        """What remains of a step that succeeded: its counts, unless the device found infinities."""
        if self.masters:
            for state, copy in zip(self.states, self.masters, strict=True):
                if copy is not None:
                    state["master"] = copy
        if found_inf is None:
            self.counts.advance()
        else:
            for p, state in zip(self.params, self.states, strict=True):
                state["step"] = state["step"].to(p.device, non_blocking=True)
                state["step"].add_((found_inf == 0).to(p.device, non_blocking=True))
        if not torch.is_grad_enabled():
            _mark_changed(self.params)


def _mark_changed(params: list[Tensor]) -> None:
    """Tell autograd that what it saved of the parameters is stale: kernels do not say so by themselves."""
    try:
        increment_version(params)
    except TypeError:  # an older PyTorch, which takes them one by one
        for p in params:
            increment_version(p)


def batches(parts: list[Part]) -> list[Batch]:
    """The parts by rule: those of one rule are updated together."""
    if len(parts) == 1:
        return [_alone(parts[0])]
    found: dict[Rule, Batch] = {}
    for part in parts:
        same = [other for other in parts if other.rule == part.rule]
        if len(same) == 1:
            found[part.rule] = _alone(part)
            continue
        batch = found.setdefault(part.rule, Batch(part.rule))
        n = len(part.params)
        if any(other.masters for other in same):
            batch.masters += part.masters or [None] * n
        batch.weights += part.params
        batch.grads += part.grads
        batch.histories += part.histories
        batch.lrs += part.lrs if len(part.lrs) == n else part.lrs * n
        batch.wds += [part.wd] * n
    return list(found.values())


def _alone(part: Part) -> Batch:
    return Batch(part.rule, part.params, part.grads, part.histories, part.masters, part.lrs, [part.wd])


def update_differentiably(parts: list[Part]) -> None:
    """The same by the rule's expression, recorded by autograd; sparse gradients are coalesced."""
    writes = []
    for part in parts:
        for i, (p, grad, history) in enumerate(zip(part.params, part.grads, part.histories, strict=True)):
            copy = part.masters[i] if part.masters else None
            lr = part.lrs[i if len(part.lrs) > 1 else 0]
            rows: Any = ...
            if grad.layout == torch.sparse_coo:
                grad = grad.coalesce()
                rows, grad = tuple(grad.indices()), grad.values()
                if part.rule.row_wise and len(rows) != 1:
                    raise ValueError(f"grads[{i}]: {len(rows)} sparse dimensions: must be 1 for row-wise history")
            targets = [t for t in (p, history, copy) if t is not None]
            if p.is_complex():
                grad, *targets = (torch.view_as_real(t) for t in (grad, *targets))
            weight, total = targets[-1] if copy is not None else targets[0], targets[1]
            weight, total, grad = weight[rows].to(total.dtype), total[rows], grad.to(total.dtype)
            new, total = expression.update(weight, grad, total, lr, part.wd, part.rule)
            writes += [(t, rows, total if k == 1 else new) for k, t in enumerate(targets)]
    for target, rows, value in writes:
        target[rows] = value.to(target.dtype)
