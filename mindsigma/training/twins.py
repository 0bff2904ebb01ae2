"""Networks beside the one that learns: its teacher, its average, another that learns; with its weights or copies."""

from copy import copy

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor
from mindspore.nn.utils import no_init_parameters

from mindsigma.backends.cpu import accelerate
from mindsigma.models.dit import DiT
from mindsigma.models.linear import LowRank


def teacher_of(dit, learner):
    """The DiT as it is without the adapter that it trains, to be evaluated only.

    Beside an adapter it has the very weights, which are frozen; else copies of them in the dtype of the activations.
    """
    learning = {id(parameter) for parameter in learner.parameters}

    def weight(parameter):
        if id(parameter) not in learning:
            return parameter
        return _copied(parameter, "teacher", False, dit.dtype)

    return accelerate(_twin(dit, weight, adapted=False).set_train(False))


def copy_of(dit, learner, name, learns=False):
    """A DiT like `dit` with copies of what `learner` trains, and its frozen weights themselves.

    Args:
        name: what the names of the copies begin with.
        learns: whether the copies get gradients.

    Returns:
        the DiT, in training mode if it learns, and a learner that writes and reads the copies.
    """
    copies = {id(parameter): _copied(parameter, name, learns) for parameter in learner.parameters}
    twin = _twin(dit, lambda parameter: copies.get(id(parameter), parameter)).set_train(learns)
    other = copy(learner)
    other.named = {key: copies[id(parameter)] for key, parameter in learner.named.items()}
    return accelerate(twin), other


def evaluated(dit):
    """A DiT with the very Parameters of `dit`, adapter and all, out of training mode."""
    return accelerate(_twin(dit, lambda parameter: parameter).set_train(False))


def _twin(dit, weight, adapted=True):
    """A DiT of the same make; `weight`: function from a Parameter of `dit` to the one in its place."""
    cells = dict(dit.cells_and_names())
    with no_init_parameters():
        twin = DiT(dit.config, dit.dtype, fp32_attention=dit.blocks[0].attn.in_fp32)
    for name, cell in list(twin.cells_and_names()):
        source = cells[name]
        for key in cell._params:
            setattr(cell, key, weight(source._params[key]))
        if adapted and len(getattr(source, "changes", ())) > 0:
            cell.change([_change(change, weight) for change in source.changes])
    return twin


def _change(change, weight):
    magnitude = None if change.magnitude is None else weight(change.magnitude)
    return LowRank(weight(change.a), weight(change.b), magnitude, change.index, change.count, change.scale)


def _copied(parameter, name, learns, dtype=ms.float32):
    value = Tensor(np.array(parameter.asnumpy(), np.float32))
    value = value if dtype == ms.float32 else value.astype(dtype)
    return Parameter(value, name=f"{name}.{parameter.name}", requires_grad=learns)
