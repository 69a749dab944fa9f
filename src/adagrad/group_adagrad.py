"""AdaGrad with one history value for each row."""

from __future__ import annotations

from adagrad.adagrad import AdaGrad
from adagrad.optimizer import register


@register
class GroupAdaGrad(AdaGrad):
    r"""Row-wise AdaGrad: one history value, so one step size, for each row of a weight.

    .. math::

        g &= \mathrm{clip}(\mathtt{rescale\_grad} \cdot g,\ \pm\mathtt{clip\_gradient}) + \mathtt{wd} \cdot w \\
        h_r &= h_r + \mathrm{mean}_j\, g_{rj}^2 \\
        w_{rj} &= w_{rj} - \mathtt{lr} \cdot g_{rj} / (\sqrt{h_r} + \epsilon)

    The history has shape ``(n, 1, ...)`` for a weight of shape ``(n, ...)``: for embeddings of 64 columns a 64th of
    the memory. A 1-d weight has rows of one element; a 0-d weight is refused. The mean has a fixed order of additions,
    see :mod:`adagrad.rule`.

    Parameters, errors and methods are those of :class:`~adagrad.AdaGrad`. Unlike MXNet's, which refuses it, weight
    decay is part of the gradient here, in the history as in the step. Of the dialects ``"mxnet"``, ``"mxnet1"`` and
    ``"fbgemm"`` have a row-wise AdaGrad; others lend their defaults and the places of epsilon and decay.
    """

    row_wise = True
