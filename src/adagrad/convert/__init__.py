"""Convert states of other frameworks' AdaGrad to states for an optimizer here, and back.

The history is the same quantity everywhere, so a conversion only copies arrays from one form to another, without
importing the frameworks (except JAX, for the trees in states of optax, and PyTorch, to make tensors). Each function
also takes the optimizer here that continues with the states, or that they come from. It raises ValueError if this has
epsilon or weight decay in a different place from the framework (optax and FBGEMM permit both places for weight decay),
or if it contradicts what the state holds. What a state does not hold is not compared: pass the same values yourself.

========  =======================  ================  =====================  ============
state of  learning rate            schedule's count  epsilon, weight decay  clipping
========  =======================  ================  =====================  ============
PyTorch   yes, and ``lr_decay``    the steps         yes                    only if ours
optax     only if injected         yes               epsilon if injected    no
Keras 3   unless it is a schedule  the iteration     no                     no
Keras 2   no                       the iteration     no                     no
FBGEMM    no                       no                no                     no
others    no                       no                no                     no
========  =======================  ================  =====================  ============

("Ours" are those of :class:`adagrad.torch.Adagrad`; injected is what ``optax.inject_hyperparams`` was given.)

=========  =========================================================  =============================
framework  form                                                       functions
=========  =========================================================  =============================
PyTorch    ``optimizer.state_dict()`` of ``torch.optim.Adagrad``      `from_torch`, `to_torch`
optax      the ``opt_state`` of ``optax.adagrad``, alone or in a      `from_optax`, `to_optax`
           chain
Keras      ``optimizer.variables``                                    `from_keras`, `to_keras`
FBGEMM     ``split_optimizer_states()``, ``get_optimizer_state()``    `from_fbgemm`, `to_fbgemm`
others     arrays: slot variables of TensorFlow, ``v`` of MLX         `from_arrays`, `to_arrays`
=========  =========================================================  =============================

States are dicts of index to history, to be assigned to :attr:`adagrad.Updater.states` or passed one by one to
:meth:`adagrad.Optimizer.update`. Indices are 0, 1, ... in the order of the other framework's parameters; the inverse
takes states in the order of their indices if all are integers, else in the order of the dict. Histories are copies:
NumPy arrays, writable, in C order, float32 or float64. Master copies exist for PyTorch only.

MXNet's state files need no conversion: :meth:`adagrad.Updater.load_states` reads them.
"""

from adagrad.convert.arrays import from_arrays, to_arrays
from adagrad.convert.fbgemm import from_fbgemm, to_fbgemm
from adagrad.convert.keras import from_keras, to_keras
from adagrad.convert.optax import from_optax, to_optax
from adagrad.convert.torch import from_torch, to_torch

__all__ = [
    "from_arrays",
    "from_fbgemm",
    "from_keras",
    "from_optax",
    "from_torch",
    "to_arrays",
    "to_fbgemm",
    "to_keras",
    "to_optax",
    "to_torch",
]
