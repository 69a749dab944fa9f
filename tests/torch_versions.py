"""What the tests ask of PyTorch; they run with 2.6, too, the oldest supported version."""

from __future__ import annotations

import pytest
import torch


def since(version: str, what: str) -> pytest.MarkDecorator:
    """Skip a test where PyTorch is older than ``version``, the first that has ``what`` the test needs."""
    return pytest.mark.skipif(torch.__version__ < version, reason=f"before PyTorch {version}: no {what}")


reads_sparse = since("2.7", "C function that keeps the parts of a sparse tensor alive")
"""Sparse gradients are seen by compiled code: they take the fast path on the CPU."""

has_grad_dtype = pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this PyTorch has no grad_dtype")
"""Gradients may have another dtype than their parameter."""

has_fsdp2_on_cpu = since("2.8", "mean of FSDP2's over gloo")
