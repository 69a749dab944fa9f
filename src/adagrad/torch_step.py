"""The parts of a step of :class:`adagrad.torch.Adagrad`."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

from adagrad import checks, rule as expression
from adagrad.kernels import fast_path, general_path, paths
from adagrad.kernels.batch import Batch
from adagrad.kernels.names import Names
from adagrad.kernels.tensors import checks as tensor_checks
from adagrad.kernels.tensors.versions import mark_changed
from adagrad.rule import Rule
from adagrad.torch_options import one_real, rule_and_decays
from adagrad.torch_state import WIDE, Counts, master

_is_given = functools.partial(operator.is_not, None)
_grad_of, _sum_of, _step_of = operator.attrgetter("grad"), operator.itemgetter("sum"), operator.itemgetter("step")
_ON_CPU = {torch.device("cpu")}


class Part(Batch):
    """The updates of a group, for those of its parameters that have gradients."""

    def __init__(
        self,
        group: dict[str, Any],
        states: list[dict[str, Any]],
        first: int,
        snapshots: dict[int, Snapshot | None],
        names_at: Callable[[int], Names],
        *,
        differentiable: bool,
    ) -> None:
        """``first`` is the number of parameters in earlier groups; messages count the parameters of all.

        ``snapshots`` are those of the parameters with master copies, by id, as the last step left them.
        """
        params: list[Any] = list(group["params"])
        grads: list[Any] = list(map(_grad_of, params))
        positions: Sequence[int] = range(first, first + len(params)) if first else ()
        if type(None) in map(type, grads):
            present = [i for i, grad in enumerate(grads) if grad is not None]
            params, grads, states = ([some[i] for i in present] for some in (params, grads, states))
            positions = [first + i for i in present]
        rule, wd, lr_decay = rule_and_decays(group)
        super().__init__(rule, params, grads, [], [], [], [wd], positions, names_at)
        try:
            self.histories, self.steps = list(map(_sum_of, states)), list(map(_step_of, states))
        except KeyError as missing:
            i = next(i for i, state in enumerate(states) if missing.args[0] not in state)
            raise ValueError(f"{self.names(i).state}: no {missing}: must have step and sum") from None
        self._are_unchanged: list[bool] = []
        multi_precision = group["multi_precision"]
        if multi_precision is not False and checks.boolean("multi_precision", multi_precision):
            self._are_unchanged = [_is_unchanged(p, snapshots.get(id(p))) for p in params]
            self.masters = [
                copy if is_unchanged and isinstance(copy := state.get("master"), Tensor) else master(p, state)
                for p, state, is_unchanged in zip(params, states, self._are_unchanged, strict=True)
            ]
        self.states, self._snapshots = states, snapshots
        lr = group["lr"]
        is_usual = type(lr) is float and math.isfinite(lr) and lr_decay == 0
        self.lrs = [lr] if is_usual else self._lrs(lr, lr_decay, keep_tensor=differentiable)

    @functools.cached_property
    def counts(self) -> Counts:
        """The step counts, checked: TypeError or ValueError if they are not counts."""
        return Counts(self.steps, self.names)

    def on_cuda(self) -> bool:
        return all(p.is_cuda for p in self.weights)

    def _lrs(self, lr: Any, decay: Any, *, keep_tensor: bool) -> list[Any]:
        """Return the learning rate of each parameter, or one for all; a tensor if the host need not know it."""
        if isinstance(lr, Tensor):
            lr = one_real("lr", lr if keep_tensor else lr.detach())
            keep_tensor = keep_tensor or (lr.is_cuda and self.on_cuda())
            lr = lr if keep_tensor else float(lr)
            if keep_tensor and lr.is_cuda and lr.dtype not in (torch.float32, torch.float64):
                lr = lr.float()  # which the kernels read
        if not isinstance(lr, Tensor):
            # Its sign was checked initially; a schedule that falls below zero by a rounding error need not stop here.
            lr = checks.finite("lr", lr)
        if decay == 0:
            return [lr]
        return _decayed(lr, decay, self.counts.values(wait=not self.on_cuda()))

    def advance(self, found_inf: Tensor | None, skips: list[Tensor]) -> None:
        """Add 1 to the parameters' counts.

        Counts on a device stay unchanged if the device found infinities, or one of its ``skips`` is not 0. The others
        stay unchanged if it found infinities, and move to the device, because the host does not wait for the result.
        """
        devices = {skip.device for skip in skips}
        if self.counts.are_plain:
            devices &= _ON_CPU  # where plain counts are: they need not be asked one by one
        if found_inf is None and not (devices and any(state["step"].device in devices for state in self.states)):
            self.counts.advance()
            return
        together: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for p, state in zip(self.weights, self.states, strict=True):
            if found_inf is not None:
                state["step"] = state["step"].to(p.device, non_blocking=True)
            together.setdefault((state["step"].device, state["step"].dtype), []).append(state["step"])
        with torch.inference_mode():  # for parameters made in it, counts are inference tensors
            for (device, dtype), counts in together.items():
                went = _went(device, found_inf, skips)
                torch._foreach_add_(counts, went.to(dtype) if isinstance(went, Tensor) else went)

    def keep_masters(self) -> None:
        """Store the updated master copies in the state."""
        snapshots = self._snapshots
        each = zip(self.weights, self.states, self.masters, self._are_unchanged, strict=True)
        for p, state, copy, is_unchanged in each:
            if copy is not None:
                state["master"] = copy
                # The step has changed the values of the parameter alone: the memory is the same.
                before = snapshots.get(id(p)) if is_unchanged else None
                snapshots[id(p)] = _snapshot(p) if before is None else (p._version, before[1], before[2])


def _went(device: torch.device, found_inf: Tensor | None, skips: list[Tensor]) -> Any:
    """Return 1, or a tensor of 1 or 0 on the device: whether the kernels launched there changed anything."""
    flags = [skip.reshape(()) for skip in skips if skip.device == device]
    if found_inf is not None:
        flags.append(found_inf.to(device, non_blocking=True))
    return functools.reduce(operator.mul, [flag == 0 for flag in flags]) if flags else 1


def _decayed(lr: Any, decay: float, counts: list[Any]) -> list[Any]:
    """Return the learning rate for each number of previous steps; a tensor if that, or ``lr``, is one."""
    on_device = [count for count in counts if isinstance(count, Tensor)]
    if not on_device and not isinstance(lr, Tensor):
        return [lr / (1 + count * decay) for count in counts]
    if 0 < len(on_device) < len(counts):
        return [rate for count in counts for rate in _decayed(lr, decay, [count])]
    # In double, and tensors by tensors: PyTorch divides a number by a tensor, and on CUDA a tensor by a number, as
    # reciprocal times number, which is rounded twice.
    divisors: list[Tensor]
    if on_device:
        divisors = list(torch._foreach_mul(on_device, decay))
        torch._foreach_add_(divisors, 1)
    else:
        widest = torch.float32 if lr.device.type == "mps" else torch.float64
        divisors = [lr.new_full((), 1 + count * decay, dtype=widest) for count in counts]
    starts: dict[torch.device, Tensor] = {}
    for divisor in divisors:
        if divisor.device not in starts:
            is_tensor = isinstance(lr, Tensor)
            start = lr.to(divisor.device, non_blocking=True) if is_tensor else divisor.new_full((), lr)
            starts[divisor.device] = start.to(divisor.dtype)
    return list(torch._foreach_div([starts[divisor.device] for divisor in divisors], divisors))


Snapshot: TypeAlias = "tuple[int, int, Any]"
"""A parameter as a step left it: how often it had been changed in place, the address of its memory and a weak reference
to that, because an address may be reused. None instead of the reference if it has no memory of its own."""


_expired = torch.UntypedStorage._expired


def _is_unchanged(p: Tensor, snapshot: Snapshot | None) -> bool:
    """Whether nothing has changed a parameter since; False if that is not known."""
    if snapshot is None or p._version != snapshot[0]:
        return False
    return snapshot[2] is None or (p.data_ptr() == snapshot[1] and not _expired(snapshot[2].cdata))


def _snapshot(p: Tensor) -> Snapshot | None:
    """Remember a parameter after a step; None if PyTorch does not count its changes."""
    if p.is_inference():
        return None
    if isinstance(p, FakeTensor):
        return p._version, 0, None
    try:
        return p._version, p.data_ptr(), StorageWeakRef(p.untyped_storage())  # type: ignore[no-untyped-call]
    except RuntimeError:  # a wrapper subclass without its own memory
        return p._version, 0, None


def _batches(parts: list[Part]) -> list[Batch]:
    """Group the parts by rule, for one update each. None is empty, unless it is the only one."""
    by_rule: dict[Rule, list[Part]] = {}
    for part in [part for part in parts if part.weights] or parts[:1]:
        by_rule.setdefault(part.rule, []).append(part)
    return [same[0] if len(same) == 1 else _together(rule, same) for rule, same in by_rule.items()]


def _together(rule: Rule, parts: list[Part]) -> Batch:
    batch, positions = Batch(rule, [], [], [], [], [], [], names_at=parts[0].names_at), list[int]()
    has_masters = any(part.masters for part in parts)
    for part in parts:
        n = len(part.weights)
        if has_masters:
            batch.masters += part.masters or [None] * n
        batch.weights += part.weights
        batch.grads += part.grads
        batch.histories += part.histories
        batch.lrs += part.lrs if len(part.lrs) == n else part.lrs * n
        batch.wds += part.wds * n
        positions += part.positions or range(n)
    batch.positions = positions
    return batch


def _widen_gradients(batches: Sequence[Batch]) -> bool:
    """Convert gradients whose dtype is not their parameter's to the history's dtype, where that is exact.

    Returns whether there were any.
    """
    found = False
    for batch in batches:
        for i, (p, grad) in enumerate(zip(batch.weights, batch.grads, strict=True)):
            wide = WIDE.get(p.dtype, p.dtype)
            if grad.dtype != p.dtype and wide in _WIDER.get(grad.dtype, ()):
                batch.grads[i], found = grad.to(wide), True
    return found


_WIDER = {
    torch.float16: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}
"""The dtypes that have all numbers of a dtype."""


def update(parts: list[Part], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Update the parameters by kernels, and their counts of steps.

    Raises what :func:`fast_path.update` and :func:`paths.prepare` do, and for counts that cannot advance.
    """
    batches: Sequence[Batch] = parts if len(parts) == 1 else _batches(parts)
    threads = torch.get_num_threads()
    owed: list[Counts] = []  # counts still to be advanced: all, or none if they advanced with the weights
    skips: list[Tensor] = []
    steps: list[Tensor] = []  # those that the fast path advances
    is_plain = paths.seem_plain(batches, grad_scale, found_inf)
    if is_plain:
        steps = parts[0].steps if len(parts) == 1 else [step for part in parts for step in part.steps]
    try:
        if not (is_plain and fast_path.update(batches, steps, threads)):
            counts = [part.counts for part in parts]
            prepared = paths.prepare(batches, steps, threads, grad_scale, found_inf, widen=_widen_gradients)
            owed = [] if prepared is paths.DONE else counts
            skips = prepared.run()
    except Exception:
        raise
    except BaseException:  # Python notices an interrupt only after the kernels have finished
        _finish(parts, owed, found_inf, skips)
        raise
    _finish(parts, owed, found_inf, skips)


def _finish(parts: list[Part], owed: list[Counts], found_inf: Tensor | None, skips: list[Tensor]) -> None:
    """Complete a step that succeeded."""
    for part in parts:
        if owed:
            part.advance(found_inf, skips)
        mark_changed([*part.weights, *part.histories, *filter(_is_given, part.masters)])
        if part.masters:
            part.keep_masters()


def update_differentiably(parts: list[Part]) -> None:
    """Update the parameters by the rule's expressions, recorded by autograd; sparse gradients are coalesced."""
    writes = []
    counts = [part.counts for part in parts]
    _widen_gradients(parts)
    general_path.check_without_row_ids(_batches(parts))
    for part in parts:
        for i, (p, grad, history) in enumerate(zip(part.weights, part.grads, part.histories, strict=True)):
            copy = part.masters[i] if part.masters else None
            lr = part.lrs[i if len(part.lrs) > 1 else 0]
            rows: Any = ...
            if torch.is_grad_enabled() and p.is_leaf and p.requires_grad:
                raise RuntimeError(
                    f"{part.names(i).weight}: a leaf that requires grad: autograd cannot record its update"
                )
            if grad.layout == torch.sparse_coo:
                for d, indices in enumerate(grad._indices()):
                    tensor_checks.check_rows(part.names(i), indices, p.shape[d])
                grad = grad.coalesce()
                rows, grad = tuple(grad.indices()), grad.values()
            targets = [t for t in (p, history, copy) if t is not None]
            if p.is_complex():
                grad, *targets = (torch.view_as_real(t) for t in (grad, *targets))
            weight, total = targets[-1] if copy is not None else targets[0], targets[1]
            weight, total, grad = weight[rows].to(total.dtype), total[rows], grad.to(total.dtype)
            new, total = expression.update(weight, grad, total, lr, part.wds[0], part.rule)
            writes += [(t, rows, total if k == 1 else new) for k, t in enumerate(targets)]
    for target, rows, value in writes:
        target[rows] = value.to(target.dtype)
    for part, count in zip(parts, counts, strict=True):
        count.advance()
        if part.masters:
            part.keep_masters()
