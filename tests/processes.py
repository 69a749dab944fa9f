"""Fresh interpreters that run a piece of code."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import adagrad

SOURCES = str(Path(adagrad.__file__).parents[1])
LIMIT = 300
"""Seconds after which a process is taken to hang."""

posix = pytest.mark.skipif(os.name != "posix", reason="forks, permissions and peaks of memory are asked of POSIX")


def start(code: str, *, options: tuple[str, ...] = ("-W", "error"), **environment: str | None) -> subprocess.Popen[str]:
    """A fresh interpreter that runs ``code``; a variable given as None is taken out of its environment."""
    variables = {**os.environ, "PYTHONPATH": SOURCES, **environment}
    return subprocess.Popen(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        env={name: value for name, value in variables.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What it printed; a failure or a hang fails the test."""
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"still running after {LIMIT} s\n{out}\n{err}") from None
    assert process.returncode == 0, f"ended with {process.returncode}\n{out}\n{err}"
    return out.strip()


def run(code: str, **environment: Any) -> str:
    return finish(start(code, **environment))
