"""Where a run begins: a checkpoint, changed on the way from weak to strong if asked for, or fresh weights."""

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.nn.utils import no_init_parameters

from mindsigma.backends.cpu import accelerate
from mindsigma.conversion import surgery
from mindsigma.conversion.component import open_source
from mindsigma.errors import MindSigmaError
from mindsigma.models.dit import DiT
from mindsigma.weights.formats.finite import finite


def open_start(model, changes=None, **config):
    """The DiT's Component that a run begins from.

    Args:
        model: path, bundled name or hub id.
        changes: dict with any of `kv_compression` ("conv:2:14-27"), `kv_init` ("average" or "random"), `grow_to`
            (pixels), `position_scale` ("interpolate" or "keep"), each of which leaves a record.
        config: DiTConfig fields that a bare file does not tell.
    """
    component = open_source(model, "dit", **config).components[0]
    changes = changes or {}
    if changes.get("kv_compression"):
        component = surgery.compress_keys(component, changes["kv_compression"], changes.get("kv_init", "average"))
    if changes.get("grow_to"):
        interpolate = changes.get("position_scale") != "keep"
        component = surgery.grow_resolution(component, changes["grow_to"], interpolate)
    return component


def build_dit(config, dtype=ms.float32, fp32_attention=False, component=None, seed=0, parameter_dtype=ms.float32):
    """DiT in training mode with a Component's weights, or with random ones that follow from the seed alone.

    `parameter_dtype`: fp32, unless the weights stay as they are.
    """
    options = {"dtype": dtype, "parameter_dtype": parameter_dtype, "fp32_attention": fp32_attention}
    if component is None:
        ms.set_seed(seed)
        dit = DiT(config, **options)
        dit.init_parameters_data()
        return accelerate(dit.set_train())
    with no_init_parameters():
        dit = DiT(config, **options)
    for name, parameter in dit.parameters_and_names():
        if name not in component.view or tuple(component.view.shape(name)) != tuple(parameter.shape):
            raise MindSigmaError(f"{component.path}: tensor '{name}' is missing or does not fit the network")
        value = Tensor(np.array(finite(component.path, name, component.view.read(name)), np.float32))
        parameter.set_data(value if parameter_dtype == ms.float32 else value.astype(parameter_dtype))
    return accelerate(dit.set_train())
