"""A T5 encoder that is handed the weights of one layer at a time: slower for every text, but small however deep T5 is.

At its peak it holds two layers: MindSpore keeps the inputs of a graph's last call until the next one.
"""

import numpy as np
from mindspore import Tensor
from mindspore import dtype as mstype
from mindspore.nn.utils import no_init_parameters

from mindsigma.models.t5 import T5Encoder, encoder_layer
from mindsigma.ops.functional import rms_norm
from mindsigma.ops.shared_graph import SharedGraph


def streamed_layer(x, bias, q, k, v, o, attention_norm, wi_0, wi_1, wo, ff_norm, eps, num_heads, kernels):
    """`encoder_layer` with its weights as inputs."""
    return encoder_layer(x, bias, eps, num_heads, kernels, q, k, v, o, attention_norm, wi_0, wi_1, wo, ff_norm)


def streamed_norm(x, weight, eps, kernels):
    """`rms_norm` with its weight as an input."""
    return rms_norm(x, eps, kernels, weight)


class StreamedT5Encoder:
    """Computes what T5Encoder computes, bit for bit if the weights are the same.

    Args:
        config, dtype, kernels: as of T5Encoder.
        weights: function (name, dtype, rows=None) -> Tensor of a weight under T5Encoder's name, or of some of its rows.
    """

    def __init__(self, config, dtype, weights, kernels=None):
        self.config, self.dtype, self._weights = config, dtype, weights
        with no_init_parameters():
            encoder = T5Encoder(config, dtype, kernels)
        names = {id(parameter): name for name, parameter in encoder.parameters_and_names()}
        self._layers = [
            [(names[id(weight)], weight.dtype) for weight in layer.run.weights] for layer in encoder.encoder.block
        ]
        eps, kernels = encoder.last_norm.static
        self._bias = encoder.bias
        self._layer = SharedGraph(streamed_layer, static=(eps, config.num_heads, kernels), of_operations=True)
        self._norm = SharedGraph(streamed_norm, static=(eps, kernels))

    def __call__(self, token_ids, mask):
        """As T5Encoder: token ids and mask (N, L) to states (N, L, d_model) fp32."""
        used, places = np.unique(token_ids.asnumpy(), return_inverse=True)
        rows = self._weights("shared.weight", self.dtype, used).astype(mstype.float32).asnumpy()
        x = Tensor(rows[places.reshape(token_ids.shape)])
        table = self._weights("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", mstype.float32)
        bias = self._bias(table, mask)
        for layer in self._layers:
            weights = [self._weights(name, dtype) for name, dtype in layer]
            x = self._layer(x, bias, *weights)
            x.asnumpy()  # wait, so that this layer's weights are gone before the next one's come
            del weights
        return self._norm(x, self._weights("encoder.final_layer_norm.weight", mstype.float32))
