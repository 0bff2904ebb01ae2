"""The graph an NPU would run, exported on this host and inspected: one graph, fused attention, legal shapes."""

from collections import Counter

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from mindspore.nn.utils import no_init_parameters
from mindspore.train import mind_ir_pb2

from mindsigma.backends.ascend import align_heads
from mindsigma.models.dit import DiT, DiTConfig
from mindsigma.models.t5 import T5Config, T5Encoder
from mindsigma.models.vae import VAE
from mindsigma.models.vae_config import VAEConfig
from mindsigma.ops.operators import composing_for
from mindsigma.sampling.denoising import GuidedStep
from mindsigma.sampling.dpm_solver import DPMSolver

DEPTH = 3
CONFIG = DiTConfig(depth=DEPTH, kv_compression="conv:2:2")


def exported(cell, inputs, folder):
    """Nodes of the exported graph: list of (kind, output shape, output dtype)."""
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        with composing_for("Ascend"):
            ms.export(cell, *inputs, file_name=str(folder / "graph"), file_format="MINDIR")
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
    model = mind_ir_pb2.ModelProto()
    model.ParseFromString((folder / "graph.mindir").read_bytes())
    nodes = []
    for function in [model.graph, *model.functions]:
        for node in function.node:
            shape = next((attribute for attribute in node.attribute if attribute.name == "shape"), None)
            tensors = []
            if shape is not None:  # of several outputs the last: FlashAttentionScore's is the attention
                tensors = list(shape.tensors) or [tensor for value in shape.values for tensor in value.tensors]
            dims, kind = (tuple(tensors[-1].dims), tensors[-1].data_type) if tensors else (None, None)
            nodes.append((node.op_type.split("::")[-1].split(":")[0], dims, kind))
    return nodes


def weights(cell):
    """Fill a cell built without initialisation, cheaply."""
    for parameter in cell.get_parameters():
        parameter.set_data(Tensor(np.zeros(parameter.shape, np.float32)).astype(parameter.dtype))
    return cell


@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16])
def test_dit_is_one_graph_with_fused_attention(dtype, tmp_path):
    """XL's width at 1024 px: heads of 72 reach the kernel as 80, keys of the compressed layer as a quarter."""
    with no_init_parameters():
        dit = DiT(CONFIG, dtype)
    inputs = (
        Tensor(np.zeros((2, 4, 128, 128), np.float32)),
        Tensor(np.zeros(2, np.float32)),
        Tensor(np.zeros((2, 64, 4096), np.float32)),
        Tensor(np.ones((2, 64), np.int32)),
    )
    nodes = exported(weights(dit), inputs, tmp_path)
    count = Counter(kind for kind, _, _ in nodes)
    half = mind_ir_pb2.TensorProto.FLOAT16 if dtype == ms.float16 else mind_ir_pb2.TensorProto.BFLOAT16
    assert [data for kind, _, data in nodes if kind == "FlashAttentionScore"] == [half] * 2 * DEPTH
    assert count["Softmax"] == count["SoftmaxExt"] == count["BatchMatMul"] == 0
    wide = [dims for kind, dims, data in nodes if kind == "Dense" and data == half]
    # The heavy products are in half precision, on heads of 80 columns; the compressed layer's keys get them later.
    assert (2, 4096, 3 * 1280) in wide and (2, 4096, 4608) in wide and (2, 4096, 1280 + 2 * 1152) in wide
    widened = [dims for kind, dims, _ in nodes if kind == "ConstantPadND" and dims and len(dims) == 3 and dims[1] == 80]
    tokens = {dims for dims in widened if dims[0] > 3 * 16}
    assert tokens == {(2 * 1024 * 16, 80, 1), (1152 * 16, 80, 1)}  # compressed keys; the columns of a weight


def test_the_mlp_of_4096_px_is_in_two_pieces(tmp_path):
    with no_init_parameters():
        dit = DiT(DiTConfig(depth=1, input_size=512, pe_interpolation=8.0), ms.float16)
    inputs = np.zeros((2, 4, 512, 512), np.float32), np.zeros(2, np.float32), np.zeros((2, 16, 4096), np.float32)
    nodes = exported(weights(dit), [*map(Tensor, inputs)], tmp_path)
    hidden = [dims for kind, dims, _ in nodes if kind == "Dense" and dims[-1] == 4608]
    assert hidden == [(65536, 4608)] * 2
    assert Counter(kind for kind, _, _ in nodes)["GeLU"] == 2 + 1  # one of the caption


def test_vae_and_t5_export(tmp_path):
    with no_init_parameters():
        vae = VAE(VAEConfig(block_out_channels=(32, 64), layers_per_block=1), ms.float16)
        t5 = T5Encoder(T5Config(vocab_size=64, d_model=128, d_ff=256, num_layers=2, num_heads=2), ms.float16)
    nodes = exported(weights(vae), (Tensor(np.zeros((1, 4, 32, 32), np.float16)),), tmp_path)
    count = Counter(kind for kind, _, _ in nodes)
    assert count["FlashAttentionScore"] == 1 and count["Conv2DExt"] > 10
    with no_init_parameters():  # SDXL's own VAE stays in fp32, its head is wide and then left to portable operators
        vae = VAE(VAEConfig(block_out_channels=(32, 288), layers_per_block=1), ms.float32)
    nodes = exported(weights(vae), (Tensor(np.zeros((1, 4, 32, 32), np.float32)),), tmp_path)
    assert sum(kind == "FlashAttentionScore" for kind, _, _ in nodes) == 0
    ids = Tensor(np.zeros((1, 16), np.int32))
    nodes = exported(weights(t5), (ids, ids), tmp_path)
    assert sum(kind == "MatMul" for kind, _, _ in nodes) == 2 * 7


class ExportedStep(ms.nn.Cell):
    """A GuidedStep with the caption's keys and values as single tensors, since an exported graph takes no tuples."""

    def __init__(self, dit):
        super().__init__()
        self.step = GuidedStep(dit, DPMSolver(), True)

    def construct(self, latents, newest, oldest, numbers, scale, modulation, position, *keys_values):
        text_kv = ()
        for i in range(len(keys_values) // 2):
            text_kv += ((keys_values[2 * i], keys_values[2 * i + 1]),)
        return self.step(latents, (newest, oldest), numbers, scale, text_kv, modulation, position)


def denoising_step(folder, depth, compression=None):
    """Nodes of XL's guided step at 1024 px, solver included, by kind."""
    with no_init_parameters():
        config = DiTConfig(depth=depth, kv_compression=compression, input_size=128, pe_interpolation=2.0)
        dit = DiT(config, ms.float16)
    align_heads(weights(dit))
    half = [(1, 6 * depth + 2, 1152), (1, 4096, 1152)] + [(2, 128, 1280)] * (2 * depth)
    inputs = [np.zeros(shape, np.float32) for shape in ((1, 4, 128, 128),) * 3 + ((6,), ())]
    inputs += [np.zeros(shape, np.float16) for shape in half]
    return Counter(kind for kind, _, _ in exported(ExportedStep(dit), [*map(Tensor, inputs)], folder))


FREE = ("TupleGetItem", "MakeTuple", "Load", "Constant", "Reshape", "UpdateState")  # no kernel, or none that moves data
PLAIN = {
    "LayerNormExt": 1, "AddLayerNormV2": 1, "Dense": 6, "SplitTensor": 1, "FlashAttentionScore": 2, "GeLU": 1,
    "AddcmulExt": 2, "NarrowView": 1, "UnstackExtView": 1,  # views of the modulation's six rows
}  # fmt: skip


def test_a_step_has_no_node_to_spare(tmp_path):
    """A block of the denoising step: no transpose, no padding, no cast, no mask; a compressed one pads keys, values."""
    one, two = denoising_step(tmp_path, 1), denoising_step(tmp_path, 2)
    block = {kind: two[kind] - one[kind] for kind in two if two[kind] > one[kind] and kind not in FREE}
    assert block == PLAIN
    compressed = denoising_step(tmp_path, 2, "conv:2:1")
    block = {kind: compressed[kind] - one[kind] for kind in compressed if compressed[kind] > one[kind]}
    more = {"Mul": 2, "SumExt": 2, "Add": 2, "LayerNormExt": 3, "ConstantPadND": 2, "NarrowView": 4, "Transpose": 1}
    del more["Transpose"], block["Transpose"]  # of the convolution's weight
    expected = {**PLAIN, **more}
    del expected["SplitTensor"]
    assert {kind: count for kind, count in block.items() if kind not in FREE} == expected
    rest = {kind: one[kind] - two[kind] + one[kind] for kind in two if kind not in FREE}
    assert (
        rest["Cast"] == 2 and rest["Transpose"] == 2 and rest["Dense"] == 2
    )  # latents in and out: 16 channels a token


def training_dit(dtype, parameter_dtype, kv_compression=None):
    """A DiT of one block for the tests of the training step."""
    config = DiTConfig(depth=1, hidden_size=144, num_heads=2, caption_channels=32, kv_compression=kv_compression)
    with no_init_parameters():
        return weights(DiT(config, dtype, parameter_dtype=parameter_dtype).set_train())


def exported_step(dit, parameters, dtype, folder):
    """Nodes of the exported training step of a DiT with AdamW and averages, where `parameters` learn, and the step."""
    from mindsigma.training.loss import COLUMNS
    from mindsigma.training.optimizers import OptimizerConfig
    from mindsigma.training.step import StepConfig, TrainingStep

    class Exported(ms.nn.Cell):
        """The step of a last micro-batch, since an exported graph takes tensors only."""

        def __init__(self, step):
            super().__init__(auto_prefix=False)
            self.step = step

        def construct(self, rate, *inputs):
            return self.step(rate, True, *inputs)

    settings = StepConfig(ema_decay=0.9, loss_scale=65536.0 if dtype == ms.float16 else 0.0)
    with composing_for("Ascend"):
        step = TrainingStep(dit, parameters, OptimizerConfig("adamw"), settings)
    shapes = ((1,), (1, 4, 32, 32), (1, 4, 32, 32), (1, len(COLUMNS)), (1,), (1, 16, 32), (1, 16))
    return exported(Exported(step), [Tensor(np.zeros(shape, np.float32)) for shape in shapes], folder), step


def written_once(step, count):
    """Each weight, the two averages and the moving average of each group of one shape, and the controls."""
    assert len(step.groups) < len(step.parameters)
    assert count["InplaceCopy"] == len(step.parameters) + 3 * len(step.groups) + 1


@pytest.mark.parametrize(
    ("dtype", "recompute"), [(ms.bfloat16, True), pytest.param(ms.float16, False, marks=pytest.mark.slow)]
)
def test_training_step_is_one_graph(dtype, recompute, tmp_path):
    """Forward, backward, clip, optimiser and average; attention fused both ways, half precision over fp32 weights."""
    dit = training_dit(dtype, ms.float32, "conv:2:0" if recompute else None)
    if recompute:
        ms.set_context(mode=ms.GRAPH_MODE)  # where the graph is recomputed, not the chain
        dit.blocks[0].recompute()
    nodes, step = exported_step(dit, dit.trainable_params(), dtype, tmp_path)
    count = Counter(kind for kind, _, _ in nodes)
    assert count["FlashAttentionScoreGrad"] == 2 and count["FlashAttentionScore"] == (4 if recompute else 2)
    half = mind_ir_pb2.TensorProto.FLOAT16 if dtype == ms.float16 else mind_ir_pb2.TensorProto.BFLOAT16
    assert {data for kind, _, data in nodes if kind.startswith("FlashAttention")} == {half}
    written_once(step, count)
    assert count["Softmax"] == count["BatchMatMul"] == 0
    # Queries, keys and values of a compressed block are copies: a view would keep the product of each block.
    assert count["SplitWithSize"] == (2 if recompute else 0)


@pytest.mark.parametrize(
    ("dtype", "dora"), [(ms.float16, False), pytest.param(ms.bfloat16, True, marks=pytest.mark.slow)]
)
def test_training_step_of_an_adapter_is_one_graph(dtype, dora, tmp_path):
    """Half precision for the frozen weights, fp32 for what stands beside them; only the adapter is assigned to."""
    from mindsigma.training.learner import AdapterLearner
    from mindsigma.training.lora import AdapterConfig, new_adapter

    rank = 4
    dit = training_dit(dtype, dtype)
    learner = AdapterLearner(dit, new_adapter(dit, AdapterConfig(rank, dora=dora)))
    nodes, step = exported_step(dit, learner.parameters, dtype, tmp_path)
    count = Counter(kind for kind, _, _ in nodes)
    half = mind_ir_pb2.TensorProto.FLOAT16 if dtype == ms.float16 else mind_ir_pb2.TensorProto.BFLOAT16
    assert count["FlashAttentionScore"] == count["FlashAttentionScoreGrad"] == 2
    assert {data for kind, _, data in nodes if kind.startswith("FlashAttention")} == {half}
    low = {data for kind, dims, data in nodes if kind == "MatMul" and dims and dims[-1] == rank}
    assert low == {mind_ir_pb2.TensorProto.FLOAT}
    assert half in {data for kind, dims, data in nodes if kind == "MatMul" and dims == (256, 3 * 144)}
    written_once(step, count)
    assert len(learner.parameters) == (3 if dora else 2) * len(learner.adapter.entries)
