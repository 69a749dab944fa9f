"""The ``state_dict()`` of ``torch.optim.Adagrad``, and of :class:`adagrad.torch.Adagrad`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from adagrad import checks
from adagrad.adagrad import AdaGrad
from adagrad.convert.arrays import States, floats, history, is_row_wise, single
from adagrad.convert.trajectory import count, next_lr, ordered, require_adagrad, require_rate, require_rule
from adagrad.rates import Index


def from_torch(state_dict: Mapping[str, Any], optimizer: AdaGrad) -> States:
    """Convert the ``state_dict()`` of ``torch.optim.Adagrad`` or :class:`adagrad.torch.Adagrad` to states.

    Between these two no conversion is needed: each loads what the other saved. That of
    ``torchrec.optim.RowWiseAdagrad`` is converted for :class:`~adagrad.GroupAdaGrad`.

    Parameters
    ----------
    state_dict : mapping
        With ``state`` and ``param_groups``.
    optimizer : AdaGrad
        Continues with the states. Epsilon, weight decay and, at the next update, the learning rate must be those of
        the groups: construct it with ``dialect="torch"``, and with multipliers if groups differ.

    Returns
    -------
    dict of int to array
        By parameter number, across all groups; pairs ``(master copy, history)`` if there is a master copy.

    Raises
    ------
    ValueError
        If the learning rate at the next update or an option of the rule in the groups (epsilon, weight decay, maximize
        and, from :class:`adagrad.torch.Adagrad`, its own) is not the optimizer's, ``lr_decay`` is not 0 and the
        optimizer has no ``lr_scheduler`` that continues it, or the parameters differ in their steps, a history is in
        float16 or bfloat16, or ``state_dict`` is not such a dict.

    Examples
    --------
    >>> import torch
    >>> from adagrad import AdaGrad, convert
    >>> parameter = torch.nn.Parameter(torch.ones(2))
    >>> before = torch.optim.Adagrad([parameter], lr=0.5, initial_accumulator_value=0.1)
    >>> convert.from_torch(before.state_dict(), AdaGrad(learning_rate=0.5, dialect="torch"))
    {0: array([0.1, 0.1], dtype=float32)}
    """
    require_adagrad(optimizer)
    try:
        saved = state_dict["state"]
        found = [
            (index, {"lr_decay": 0, "weight_decay": 0} | dict(group), int(saved[index]["step"]), saved[index]["sum"])
            for group in state_dict["param_groups"]
            for index in group["params"]
            if index in saved
        ]
        if not found and any(group["params"] for group in state_dict["param_groups"]):
            raise KeyError("no parameter has a state; torch.optim.Adagrad's have one from the start")
        _require_steps(found, optimizer)
        states: States = {}
        for index, group, step, array in found:
            what = f"parameter {index}"
            # Groups of torchrec's RowWiseAdagrad do not say that it is row-wise; the shapes of its histories do.
            row_wise = optimizer.row_wise and is_row_wise(array)
            _require_options(what, {"row_wise": row_wise} | group, optimizer, index)
            require_rate(what, float(group["lr"]), float(group["lr_decay"]), step, optimizer, index)
            states[index] = history(f"sum of {what}", array, optimizer)
            if "master" in saved[index]:
                if not optimizer.multi_precision:
                    raise ValueError(f"master of {what}: the optimizer must keep it, too: pass multi_precision=True")
                states[index] = (floats(f"master of {what}", saved[index]["master"]), states[index])
    except (TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RuntimeError) as error:
        need = "must be what torch.optim.Adagrad.state_dict() returns, with nothing around it"
        raise ValueError(f"state_dict: {need}: {error!r}") from error
    return states


def _require_steps(found: Sequence[tuple[Index, Mapping[str, Any], int, Any]], optimizer: AdaGrad) -> None:
    """Check that one schedule can continue all parameters that have one."""
    scheduled = optimizer.lr_scheduler is not None
    steps = {index: step for index, group, step, _ in found if scheduled or group["lr_decay"] != 0}
    counts = sorted(set(steps.values()))
    if len(counts) > 1 and any(count(optimizer, index) != step for index, step in steps.items()):
        raise ValueError(
            f"step={checks.describe(counts)}: must be one number: a schedule counts from one begin_num_update, and so "
            "cannot continue parameters that differ in their steps; convert these separately, for one optimizer each"
        )


def _require_options(what: str, group: Mapping[str, Any], optimizer: AdaGrad, index: Index) -> None:
    """Check that the options of a parameter group that affect the next step are the optimizer's."""
    wd = optimizer._get_wd(index)
    ours = {
        "eps": ("epsilon", optimizer.epsilon),
        "weight_decay": ("wd", wd),
        "maximize": ("rescale_grad < 0", optimizer.rescale_grad < 0),
        "row_wise": ("row_wise", optimizer.row_wise),
        "epsilon_inside": ("epsilon_inside", optimizer.epsilon_inside),
        "decoupled_decay": ("decoupled_decay", optimizer.decoupled_decay and wd != 0),
        "clip_value": ("clip_gradient", optimizer.clip_gradient),
    }
    missing: dict[str, Any] = dict.fromkeys(("maximize", "epsilon_inside", "decoupled_decay"), False)
    # The dict does not say whether gradients are clipped before PyTorch's step.
    group = missing | {"clip_value": optimizer.clip_gradient} | dict(group)
    for theirs, (name, value) in ours.items():
        given = group[theirs] and wd != 0 if theirs == "decoupled_decay" else group[theirs]
        # The optimizer's wd may be a product, with multipliers.
        is_same = math.isclose(given, wd, rel_tol=1e-7) if theirs == "weight_decay" else given == value
        if not is_same:
            raise ValueError(f"{theirs}={given!r} of {what}: must be the optimizer's {name}, which is {value!r}")


def to_torch(
    states: Mapping[Index, Any],
    optimizer: AdaGrad,
    *,
    groups: Sequence[Sequence[Index]] | None = None,
    ours: bool = False,
) -> dict[str, Any]:
    """Return a dict for ``torch.optim.Adagrad.load_state_dict``; inverse of :func:`from_torch`. Imports PyTorch.

    Parameters
    ----------
    states : mapping of index to state
    optimizer : AdaGrad
        The optimizer of the states, which provides the options and update counts. If it has a scheduler, ``lr`` is
        that of the next update; PyTorch's scheduler must be recreated.
    groups : list of lists of indices, optional
        The indices of each parameter group, in the order of its parameters; by default one group of all.
    ours : bool, default False
        Whether the dict is for :class:`adagrad.torch.Adagrad`, which has all options of ``AdaGrad``. Otherwise options
        that ``torch.optim.Adagrad`` lacks are refused if they would change the results.

    Raises
    ------
    ValueError
        If the target lacks an option, lr or wd differ within a group, or the groups do not contain each index once.
    """
    import torch

    _require_options_there(optimizer, ours)
    states = ordered(states)
    groups = [list(states)] if groups is None else [list(group) for group in groups]
    order = [index for group in groups for index in group]
    if len(order) != len(states) or set(order) != set(states):
        raise ValueError(f"groups={checks.describe(groups)}: must contain each index of the states once")
    numbers = {index: number for number, index in enumerate(order)}
    saved = {}
    for index, number in numbers.items():
        state = states[index]
        pair = isinstance(state, tuple) and ours
        saved[number] = {"step": torch.tensor(float(count(optimizer, index)))}
        saved[number]["sum"] = torch.from_numpy(single(index, state[1] if pair else state))
        if pair:
            saved[number]["master"] = torch.from_numpy(floats(f"master of states[{index!r}]", state[0]))
    made = [_group(optimizer, group, ours) | {"params": [numbers[index] for index in group]} for group in groups]
    return {"state": saved, "param_groups": made}


def _require_options_there(optimizer: AdaGrad, ours: bool) -> None:
    require_adagrad(optimizer)
    if abs(optimizer.rescale_grad) != 1:
        raise ValueError(
            f"rescale_grad={optimizer.rescale_grad!r}: must be 1 or -1: PyTorch does not rescale gradients"
        )
    if not ours:
        require_rule(optimizer, "torch")
        for name in ("clip_gradient", "row_wise"):
            if value := getattr(optimizer, name):
                raise ValueError(f"{name}={value!r}: torch.optim.Adagrad has no such option; adagrad.torch.Adagrad has")


def _group(optimizer: AdaGrad, indices: Sequence[Index], ours: bool) -> dict[str, Any]:
    """Return the options of a parameter group."""
    rates = {(next_lr(optimizer, index, count(optimizer, index)), optimizer._get_wd(index)) for index in indices}
    if len(rates) > 1:
        raise ValueError(f"groups: lr and wd {sorted(rates)} in one group: must be in separate groups")
    lr, wd = rates.pop() if rates else (optimizer.learning_rate, optimizer.wd)
    options = {
        "lr": lr,
        "lr_decay": 0,
        "eps": optimizer.epsilon,
        "weight_decay": wd,
        "initial_accumulator_value": optimizer.initial_accumulator_value,
        "foreach": None,
        "maximize": optimizer.rescale_grad < 0,
        "differentiable": False,
        "fused": None,
    }
    if not ours:
        return options
    return options | {
        "clip_value": optimizer.clip_gradient,
        "row_wise": optimizer.row_wise,
        "multi_precision": optimizer.multi_precision,
        "epsilon_inside": optimizer.epsilon_inside,
        "decoupled_decay": optimizer.decoupled_decay,
    }
