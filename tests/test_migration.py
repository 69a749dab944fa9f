"""Moving here: state files of MXNet, gone on with to the bit, and the code of ``docs/migrating.md``."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import adagrad
import peers
from adagrad import Updater, checkpoint, get_updater, lr_scheduler, mxnet_states
from adagrad.dialects import DIALECTS
from adagrad.mxnet_pickle import Record
from support import assert_same_bits

DATA = Path(__file__).parent / "data"
STATES = sorted((DATA / "states").glob("*.states"))
STATES_1 = sorted((DATA / "mxnet1").glob("*.states"))


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with np.load(path.with_suffix(".npz")) as file:
        arrays = dict(file)
    return arrays, json.loads(str(arrays.pop("config")))


def by_index(arrays: dict[str, np.ndarray], name: str) -> dict[int | str, np.ndarray]:
    found = {key.split("/")[1]: array for key, array in arrays.items() if key.startswith(f"{name}/")}
    return {int(index) if index.isdigit() else index: array for index, array in found.items()}


def take_steps(updater: Updater, weights: dict[Any, Any], grads: dict[Any, Any], together: bool) -> None:
    if together:
        updater(list(weights), [grads[index] for index in weights], list(weights.values()))
        return
    for index, weight in weights.items():
        updater(index, grads[index], weight)


def as_torch(arrays: dict[Any, np.ndarray]) -> dict[Any, Any]:
    return {index: torch.from_numpy(array) for index, array in arrays.items()}


# -------------------------------------------------------------------------------------------------------------- MXNet 2


def optimizer_of(config: dict[str, Any], **options: Any) -> adagrad.AdaGrad:
    """The optimizer as its user makes it anew, who knows the hyper-parameters and how many updates there were."""
    names = ("multi_precision", "learning_rate", "wd", "epsilon", "clip_gradient", "rescale_grad")
    kwargs = {name: config[name] for name in names}
    if config["scheduler"]:
        name, arguments = config["scheduler"]
        arguments = arguments if config["learning_rate"] is None else arguments | {"base_lr": config["learning_rate"]}
        kwargs |= {"lr_scheduler": getattr(lr_scheduler, name)(**arguments), "begin_num_update": config["num_update"]}
    return adagrad.AdaGrad(**(kwargs | options))


def test_all_files_are_here() -> None:
    configs = {path.stem: load(path)[1] for path in STATES}
    assert {config["dump_optimizer"] for config in configs.values()} == {True, False}
    assert {config["dtype"] for config in configs.values()} == {"float32", "float16"}
    assert {type(config["indices"][0]) for config in configs.values()} == {int, str}
    assert {config["scheduler"][0] for config in configs.values() if config["scheduler"]} >= {
        "FactorScheduler",
        "MultiFactorScheduler",
        "CosineScheduler",
    }


def check_next_step(path: Path, updater: Updater, arrays_of: str, together: bool) -> None:
    arrays, _ = load(path)
    weights, grads, expected = (by_index(arrays, name) for name in ("w", "next_g", "next_w"))
    assert expected
    given = weights if arrays_of == "numpy" else as_torch(weights)
    take_steps(updater, given, grads if arrays_of == "numpy" else as_torch(grads), together)
    for index in expected:
        assert_same_bits(weights[index], expected[index], f"{path.stem}, {index!r}")


@pytest.mark.parametrize("path", STATES, ids=lambda path: path.stem)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "expression"])
@pytest.mark.parametrize("arrays_of", ["numpy", "torch"])
@pytest.mark.parametrize("together", [True, False], ids=["one call", "one by one"])
def test_the_next_step_is_that_of_mxnet_2(path: Path, fused: bool, arrays_of: str, together: bool) -> None:
    config = load(path)[1]
    # What the file holds of the optimizer replaces whatever the one here was made with.
    made = adagrad.AdaGrad() if config["dump_optimizer"] else optimizer_of(config)
    made.use_fused_step = fused
    updater = get_updater(made)
    updater.load_states(path)
    check_next_step(path, updater, arrays_of, together)


@pytest.mark.parametrize("path", STATES, ids=lambda path: path.stem)
@pytest.mark.parametrize("with_optimizer", [True, False])
def test_the_next_step_is_that_of_mxnet_2_after_a_file_of_ours(path: Path, with_optimizer: bool) -> None:
    config = load(path)[1]
    read = get_updater(optimizer_of(config))
    read.load_states(path)
    updater = get_updater(adagrad.AdaGrad() if with_optimizer else optimizer_of(config))
    updater.set_states(read.get_states(dump_optimizer=with_optimizer))
    check_next_step(path, updater, "numpy", together=True)


def test_another_dialect_is_not_gone_on_with() -> None:
    path = DATA / "states" / "fp32_ints_with_optimizer.states"
    updater = get_updater(adagrad.AdaGrad(dialect="optax"))
    updater.load_states(path)
    assert not updater.optimizer.rule().epsilon_inside
    check_next_step(path, updater, "numpy", together=True)


def test_files_from_before_the_dialects_have_the_rule_of_mxnet_2() -> None:
    config = adagrad.AdaGrad().config()
    del config["epsilon_inside"], config["decoupled_decay"]
    updater = get_updater(adagrad.AdaGrad(dialect="keras"))
    updater.set_states(checkpoint.encode({}, config))
    assert updater.optimizer.rule() == adagrad.AdaGrad().rule()


def test_clipping_at_zero_is_refused_with_the_reason() -> None:
    record = Record("AdaGrad")
    record.attributes = {
        "rescale_grad": 1.0, "lr": 0.1, "wd": 0.0, "clip_gradient": 0, "epsilon": 1e-6, "begin_num_update": 0,
        "num_update": 3, "_index_update_count": {0: 3}, "lr_mult": {}, "wd_mult": {}, "idx2name": {},
        "multi_precision": False, "aggregate_num": 1, "use_fused_step": True, "lr_scheduler": None,
    }  # fmt: skip
    found = mxnet_states._optimizer(mxnet_states._Attributes(record))
    with pytest.raises(
        ValueError, match="clip_gradient=0: must be None or > 0: with 0, MXNet sets dense gradients to zero"
    ):
        found.config()


# -------------------------------------------------------------------------------------------------------------- MXNet 1


@pytest.mark.parametrize("path", STATES_1, ids=lambda path: path.stem)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "expression"])
def test_the_next_steps_are_those_of_mxnet_1(path: Path, fused: bool) -> None:
    arrays, config = load(path)
    name, kwargs = config["optimizer"], dict(config["kwargs"])
    if "eps" in kwargs:
        kwargs["epsilon"] = kwargs.pop("eps")
    options = {} if config["optimizer_inside"] else kwargs | {"dialect": "mxnet1"}
    updater = get_updater(adagrad.create(name, use_fused_step=fused, **options))
    updater.load_states(path)
    weights = by_index(arrays, "w")
    for t in range(2):
        take_steps(updater, weights, by_index(arrays, f"g{t}"), together=True)
        for index, expected in by_index(arrays, f"next{t}").items():
            if name == "groupadagrad":  # MXNet adds the squares of a row in another order
                np.testing.assert_allclose(weights[index], expected, rtol=1e-6, atol=1e-7)
            else:
                assert_same_bits(weights[index], expected, f"{path.stem}, {index!r}, step {t}")


def test_mxnet_1_files_bring_their_rule() -> None:
    updater = get_updater(adagrad.AdaGrad())
    updater.load_states(DATA / "mxnet1" / "names.states")
    optimizer = updater.optimizer
    assert isinstance(optimizer, adagrad.AdaGrad)
    assert (optimizer.epsilon_inside, optimizer.decoupled_decay, optimizer.epsilon) == (True, True, 1e-7)
    assert optimizer._get_wd(1) == 0  # MXNet 1 decays what is called _weight or _gamma
    assert optimizer.num_update == 3


# ------------------------------------------------------------------------------------------------------------- the page


PAGE = (Path(__file__).parent.parent / "docs" / "migrating.md").read_text(encoding="utf-8")
SECTIONS = {
    section.splitlines()[0]: re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    for section in PAGE.split("\n## ")[1:]
}
NOT_INSTALLED = ("mxnet", "tf_keras", "mlx")


def run(section: str, names: dict[str, Any], *, between: Callable[[], dict[str, Any]] = dict) -> dict[str, Any]:
    """Run the code of a section, the old framework's where that is installed; ``between`` follows its first block."""
    for i, code in enumerate(SECTIONS[section]):
        modules = re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)
        if i > 0 or not any(module in NOT_INSTALLED or find_spec(module) is None for module in modules):
            exec(compile(code, f"{section}, block {i}", "exec"), names)
        if i == 0:
            names |= between()
    return names


def resumed(dialect: str, case: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Weight and history after five recorded steps, the next gradient and the next weight."""
    steps = peers.recorded(dialect, case)
    (weight, history), (expected, _) = steps[4], steps[5]
    return weight, history, peers.problem(case)[1][5], expected


def test_the_page_has_a_section_for_each_dialect() -> None:
    titles = ["MXNet 2", "MXNet 1", "PyTorch", "optax", "Keras", "TensorFlow", "FBGEMM", "MLX"]
    assert [title for title in SECTIONS if title in titles] == titles
    assert all(len(SECTIONS[title]) >= 2 for title in titles)
    for title in titles:
        slug = re.sub(r"[^a-z0-9-]", "", title.lower().replace(" ", "-"))
        assert f"(#{slug})" in PAGE, f"no link to {title}"


@pytest.mark.parametrize("name", DIALECTS)
def test_the_page_has_the_facts_of_the_table(name: str) -> None:
    preset = DIALECTS[name]
    (row,) = [line for line in PAGE.splitlines() if line.startswith("|") and f'"{name}"' in line and "| `sqrt" in line]
    _, _, version, divisor, lr, epsilon, start, decay, _ = (cell.strip() for cell in row.split("|"))
    assert preset.framework.startswith(version)
    assert divisor == ("`sqrt(h + eps)`" if preset.epsilon_inside else "`sqrt(h) + eps`")
    assert (preset.learning_rate is None) == (not lr[0].isdigit())
    assert preset.learning_rate is None or float(lr) == preset.learning_rate
    assert float(epsilon.split(";")[0]) == preset.epsilon
    assert float(start) == preset.initial_accumulator_value
    assert decay.endswith("decoupled" if preset.decoupled_decay else "coupled")
    assert decay.endswith("decoupled") == preset.decoupled_decay


@pytest.mark.parametrize(
    ("section", "file", "next_grad", "next_weight"),
    [
        ("MXNet 2", DATA / "states" / "fp32_ints_with_optimizer", "next_g/0", "next_w/0"),
        ("MXNet 1", DATA / "mxnet1" / "with_optimizer", "g0/0", "next0/0"),
    ],
)
def test_the_page_from_mxnet(
    section: str, file: Path, next_grad: str, next_weight: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(file.with_suffix(".states"), "model.states")
    arrays, _ = load(file)
    found = run(section, {"weight": arrays["w/0"], "grad": arrays[next_grad]})
    assert_same_bits(found["weight"], arrays[next_weight])


def test_the_page_from_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, batch = torch.nn.Linear(3, 2), torch.randn(5, 3)
    copy = torch.nn.Linear(3, 2)

    def between() -> dict[str, Any]:
        copy.load_state_dict(model.state_dict())
        for p, q in zip(copy.parameters(), model.parameters(), strict=True):
            p.grad = q.grad.clone()
        return {}

    found = run("PyTorch", {"model": model, "loss": lambda m: m(batch).square().sum()}, between=between)
    there = torch.optim.Adagrad(copy.parameters(), lr=0.1)
    there.load_state_dict(torch.load("adagrad.pt"))
    copy(batch).square().sum().backward()
    there.step()
    for p, q in zip(model.parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    saved = torch.load("adagrad.pt")["state"]
    assert found["updater"].states.keys() == saved.keys()
    for index, state in found["updater"].states.items():
        assert_same_bits(state, saved[index]["sum"])


def test_the_page_from_optax() -> None:
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    params = {"b": jax.numpy.ones(3), "a": jax.numpy.arange(4.0)}
    grads = {"b": jax.numpy.arange(3.0), "a": jax.numpy.ones(4)}
    found = run("optax", {"params": params, "grads": grads})
    updates, _ = found["solver"].update(grads, found["opt_state"])
    expected = jax.tree.leaves(optax.apply_updates(found["params"], updates))
    for weight, theirs in zip(found["weights"], expected, strict=True):
        np.testing.assert_allclose(weight, theirs, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras' own, on torch
def test_the_page_from_keras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", os.environ.get("KERAS_BACKEND", "torch"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the import says of its own dependencies
        keras = pytest.importorskip("keras", reason="keras is not installed: pip install '.[test]'")
    gradients = [np.array([1.5, -0.5], np.float32), np.ones((2, 2), np.float32)]
    grads = [keras.ops.convert_to_tensor(grad) for grad in gradients]
    variables = [keras.Variable(np.ones(grad.shape, np.float32)) for grad in gradients]

    def between() -> dict[str, Any]:
        return {"weights": [keras.ops.convert_to_numpy(variable).copy() for variable in variables]}

    names = {"grads": grads, "variables": variables, "gradients": gradients}
    found = run("Keras", names, between=between)
    found["optimizer"].apply(grads, variables)
    for weight, variable in zip(found["weights"], variables, strict=True):
        np.testing.assert_allclose(weight, keras.ops.convert_to_numpy(variable), rtol=1e-6)


def test_the_page_from_tensorflow() -> None:
    weight, history, grad, expected = resumed("tensorflow", "tiny, from zero")
    run("TensorFlow", {"accumulator": history, "grad": grad, "weight": weight})
    np.testing.assert_allclose(weight, expected, rtol=1e-6, atol=1e-7)


def test_the_page_from_mlx() -> None:
    weight, history, grad, expected = resumed("mlx", "tiny")
    run("MLX", {"v": history, "grad": grad, "weight": weight})
    np.testing.assert_allclose(weight, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # FBGEMM's, of parts of its own that it lacks
def test_the_page_from_fbgemm() -> None:
    table, history, values, expected = resumed("fbgemm", "row-wise, tiny")
    rows, columns = table.shape
    names = {"rows": rows, "columns": columns, "values": values, "ids": np.arange(rows), "table": table}
    run("FBGEMM", names, between=lambda: {"momentum1": [[history[:, 0]]]})
    np.testing.assert_allclose(table, expected, rtol=1e-6, atol=1e-7)


def test_the_page_from_mxnet_to_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = DATA / "states" / "fp32_ints"
    shutil.copy(path.with_suffix(".states"), "trainer.states")
    arrays, config = load(path)
    weights, grads = by_index(arrays, "w"), by_index(arrays, "next_g")
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.from_numpy(weight)) for weight in weights.values()])
    found = run("From MXNet to PyTorch", {"model": model})
    optimizer = found["optimizer"]
    # The hyper-parameters are not in this file: what the constructors were given holds.
    group = optimizer.param_groups[0]
    assert (group["lr"], group["eps"], group["weight_decay"]) == (0.01, 1e-6, 0.0)
    group |= {"lr": config["learning_rate"], "eps": config["epsilon"], "weight_decay": config["wd"]}
    group["clip_value"] = config["clip_gradient"]
    for p, grad in zip(model, grads.values(), strict=True):
        p.grad = torch.from_numpy(grad * np.float32(config["rescale_grad"]))
    optimizer.step()
    for p, expected in zip(model, by_index(arrays, "next_w").values(), strict=True):
        assert_same_bits(p, expected)
