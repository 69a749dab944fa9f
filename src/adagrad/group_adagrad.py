"""AdaGrad with one history value for each row."""

from __future__ import annotations

from adagrad.adagrad import AdaGrad
from adagrad.optimizer import register


@register
class GroupAdaGrad(AdaGrad):
    r"""Row-wise AdaGrad: one history value, and so one step size, for each row of a weight.

    .. math::

        g &= \mathrm{clip}(\mathtt{rescale\_grad} \cdot g,\ \pm\mathtt{clip\_gradient}) + \mathtt{wd} \cdot w \\
        h_r &= h_r + \mathrm{mean}_j\, g_{rj}^2 \\
        w_{rj} &= w_{rj} - \mathtt{lr} \cdot \frac{g_{rj}}{\sqrt{h_r} + \epsilon}

    The history has shape ``(n, 1, ...)`` for a weight of shape ``(n, ...)``: for embeddings of 64 columns it takes a
    64th of the memory. A 1-d weight has rows of one element; a 0-d weight is refused. The mean is summed in a fixed
    order, see :mod:`adagrad.rule`.

    Parameters, errors and methods are those of :class:`~adagrad.AdaGrad`. MXNet's refuses weight decay; here it is part
    of the gradient, in the history as well as in the step. Only the dialects ``"mxnet"``, ``"mxnet1"`` and ``"fbgemm"``
    have a row-wise AdaGrad; the others set their defaults and the place of epsilon and weight decay.

    References
    ----------
    Duchi, Hazan, Singer: Adaptive Subgradient Methods for Online Learning and Stochastic Optimization.
    JMLR 12, 2011. Lerer et al.: PyTorch-BigGraph: A Large-scale Graph Embedding System. SysML 2019 (one accumulated
    value for each embedding). ``mxnet.optimizer.GroupAdaGrad`` and FBGEMM's ``EXACT_ROWWISE_ADAGRAD`` take the mean
    over a row, as here.

    Examples
    --------
    >>> import numpy as np
    >>> from adagrad import GroupAdaGrad
    >>> weight, gradient = np.ones((2, 2), np.float32), np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    >>> optimizer = GroupAdaGrad(learning_rate=0.5, epsilon=0.0, wd=1.0)
    >>> state = optimizer.create_state(0, weight)
    >>> optimizer.update(0, weight, gradient, state)
    >>> state
    array([[20.5],
           [ 1. ]], dtype=float32)
    """

    row_wise = True
