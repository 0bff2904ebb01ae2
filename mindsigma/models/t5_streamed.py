"""A T5 encoder that is handed the weights of one layer at a time: slower for every text, but small at any depth."""

import numpy as np
from mindspore import Tensor, nn
from mindspore import dtype as mstype
from mindspore.nn.utils import no_init_parameters

from mindsigma.models.linear import RMSNorm
from mindsigma.models.t5 import RelativeBias, T5Layer


class StreamedT5Encoder:
    """Computes what T5Encoder computes, bit for bit if the weights are the same.

    Args:
        config: T5Config; dtype: of the activations and weights, but for what T5 keeps in fp32.
        weights: function (name, dtype, rows=None) -> Tensor of a weight under T5Encoder's name, or of some of its rows.
        prepare: function that is given the cells that compute, of which one layer serves all, to make them fast.
        layers: function of the number of layers that gives their numbers; it may show how far they are.
    """

    def __init__(self, config, dtype, weights, prepare=lambda cells: cells, layers=range):
        self.config, self.dtype, self._weights, self._layers = config, dtype, weights, layers
        with no_init_parameters():
            self._layer = T5Layer(config, dtype, is_first=False)
            self._bias, self._norm = RelativeBias(config), RMSNorm(config.d_model, config.layer_norm_epsilon)
        prepare(nn.CellList([self._layer, self._bias, self._norm], auto_prefix=False))

    def __call__(self, token_ids, mask):
        """As T5Encoder: token ids and mask (N, L) to states (N, L, d_model) fp32."""
        used, places = np.unique(token_ids.asnumpy(), return_inverse=True)
        rows = self._weights("shared.weight", self.dtype, used).astype(mstype.float32).asnumpy()
        x = Tensor(rows[places.reshape(token_ids.shape)])
        self._fill(self._bias, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias")
        bias = self._bias(mask)
        for i in self._layers(self.config.num_layers):
            self._fill(self._layer, f"encoder.block.{i}")
            x = self._layer(x, bias)
            x.asnumpy()  # wait, so that this layer's weights are gone before the next one's come
        self._fill(self._norm, "encoder.final_layer_norm")
        return self._norm(x)

    def _fill(self, cell, prefix):
        for name, parameter in cell.parameters_and_names():
            parameter.set_data(self._weights(f"{prefix}.{name}", parameter.dtype))
