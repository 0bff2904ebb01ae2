"""The training steps that an NPU runs, of every method of training, with their inputs: parts.py's "train"."""

import mindspore as ms
import numpy as np
from mindspore.nn.utils import no_init_parameters

from mindsigma.inspect.flat import FlatInputs, zeros
from mindsigma.inspect.parts import network_of, vae_of
from mindsigma.models.controlnet import ControlNet
from mindsigma.models.lpips import LPIPS
from mindsigma.runtime import DTYPES
from mindsigma.training.controlnet import CONDITION_AT, ControlledDenoising
from mindsigma.training.dmd import DMDConfig, Matching
from mindsigma.training.lcm import COLUMNS as LCM_COLUMNS
from mindsigma.training.lcm import Consistency, LCMConfig
from mindsigma.training.learner import AdapterLearner, ControlNetLearner, WholeLearner
from mindsigma.training.lora import TARGETS, AdapterConfig, new_adapter
from mindsigma.training.loss import COLUMNS, Denoising
from mindsigma.training.method import FIRST_LOSS_SCALE
from mindsigma.training.optimizers import OptimizerConfig
from mindsigma.training.pictures import pictures_of
from mindsigma.training.step import StepConfig, TrainingStep
from mindsigma.training.twins import copy_of, evaluated, teacher_of

EMA_DECAY = 0.9999  # of averages that are kept; which it is changes nothing of a plan


def training_step(request, ranks=None, zero=0, zero_group=0):
    """FlatInputs cell of a Request for part "train", and the Request with everything decided.

    Another step of the same method, as DMD has one, is in the cell's `beside`.
    """
    adapting = request.lora_rank is not None
    frozen = adapting or request.control_layers > 0
    wide = DTYPES[request.dtype] if frozen else ms.float32
    dit, request = network_of(request, parameter_dtype=wide, fp32_attention=request.fp32_attention)
    if not request.has_weights():
        for parameter in dit.get_parameters():  # what is made in the image of them must find values
            parameter.set_data(zeros((parameter.shape, parameter.dtype)))
    dit.set_train()
    if request.recompute:
        ms.set_context(mode=ms.GRAPH_MODE)  # where a block is a part of the graph that is computed again
    step = _Steps(request, dit, _learner(request, dit), ranks, {"zero": zero, "zero_group": zero_group})
    if request.recompute:  # after the adapter is in, as in a run
        _recompute(dit)
    build = _controlnet if request.control_layers else _METHODS[request.method]
    return build(step), request


def _learner(request, dit):
    """What learns, as in training/method.py."""
    if request.control_layers:
        for parameter in dit.get_parameters():
            parameter.requires_grad = False
        controlnet = ControlNet.from_dit(dit, request.control_layers, ms.float32, request.fp32_attention).set_train()
        return ControlNetLearner(controlnet)
    if request.lora_rank is not None:
        targets = tuple(request.lora_targets or TARGETS)
        return AdapterLearner(dit, new_adapter(dit, AdapterConfig(request.lora_rank, None, targets, dora=request.dora)))
    return WholeLearner(dit, np.zeros((request.tokens, dit.config.caption_channels), np.float32))


def _recompute(network):
    for block in network.blocks:
        block.recompute()


class _Steps:
    """What the methods below make their steps and inputs of."""

    def __init__(self, request, dit, learner, ranks, divided):
        self.request, self.dit, self.learner, self.ranks, self.divided = request, dit, learner, ranks, divided

    def zeros(self, *shape):
        """An fp32 tensor."""
        return zeros((shape, ms.float32))

    def latents(self):
        """Latents or noise of a micro-batch."""
        request = self.request
        return self.zeros(request.batch, self.dit.config.in_channels, request.height // 8, request.width // 8)

    def known(self):
        """Numbers, times, captions and their mask."""
        rows = self.request.batch
        return self.zeros(rows, len(COLUMNS)), self.zeros(rows), *self.text()

    def text(self, rows=None):
        """Captions and their mask, or one null caption and a mask for each."""
        request, channels = self.request, self.dit.config.caption_channels
        states = self.zeros(request.batch if rows is None else rows, request.tokens, channels)
        return states, self.zeros(request.batch, request.tokens)

    def conditions(self):
        """Micro conditions, where the network takes any."""
        rows = self.request.batch
        return (self.zeros(rows, 2), self.zeros(rows, 1)) if self.dit.config.micro_condition else ()

    def cell(self, objective, inputs, parameters=None, ema=None, masters=False):
        """FlatInputs of the last micro-batch of a TrainingStep."""
        request = self.request
        decay = EMA_DECAY if (request.ema if ema is None else ema) else 0.0
        scale = FIRST_LOSS_SCALE if request.dtype == "fp16" else 0.0
        config = StepConfig(request.accumulation, ema_decay=decay, loss_scale=scale, masters=masters, **self.divided)
        parameters = self.learner.parameters if parameters is None else parameters
        step = TrainingStep(objective, parameters, OptimizerConfig(request.optimizer), config, self.ranks)
        return FlatInputs(step, step, [self.zeros(1), True, *inputs])


def _denoising(steps):
    inputs = [steps.latents(), steps.latents(), *steps.known(), *steps.conditions()]
    return steps.cell(Denoising(steps.dit), inputs, masters=type(steps.learner) is WholeLearner)


def _controlnet(steps):
    controlnet = steps.learner.controlnet
    if steps.request.recompute:
        _recompute(controlnet)
    inputs = [steps.latents(), steps.latents(), *steps.known(), *steps.conditions()]
    inputs.insert(CONDITION_AT, steps.latents())
    return steps.cell(ControlledDenoising(steps.dit, controlnet), inputs)


def _lcm(steps):
    config, rows = LCMConfig(substeps=steps.request.lcm_substeps), steps.request.batch
    teacher = teacher_of(steps.dit, steps.learner)
    target, averages = copy_of(steps.dit, steps.learner, "target")
    objective = Consistency(steps.dit, teacher, target, averages.parameters, config)
    times = config.substeps + 1
    numbers = steps.zeros(rows, len(LCM_COLUMNS) + 2 * times), steps.zeros(times, rows)
    text = *steps.text(), *steps.text(1)
    inputs = [steps.latents(), steps.latents(), *numbers, *text, *steps.conditions()]
    return steps.cell(objective, inputs, ema=True)


def _dmd(steps):
    teacher = teacher_of(steps.dit, steps.learner)
    fake, learner = copy_of(steps.dit, steps.learner, "fake", learns=True)
    if steps.request.recompute:
        _recompute(fake)
    regression = steps.request.dmd_regression
    pictures = _pictures(steps.request) if regression == "lpips" else None
    objective = Matching(steps.dit, teacher, evaluated(fake), DMDConfig(regression=regression), pictures)
    text, wanted = (*steps.known(), *steps.text(1)), None if regression == "none" else steps.latents()
    inputs = [steps.latents(), steps.latents(), *text, wanted, *steps.conditions()]
    cell = steps.cell(objective, inputs)
    inputs = [steps.latents(), steps.latents(), *steps.known(), *steps.conditions()]
    cell.beside = (steps.cell(Denoising(fake, bound=False), inputs, learner.parameters, ema=False),)
    return cell


def _pictures(request):
    """PictureDistance by the model's VAE and LPIPS without weights."""
    with no_init_parameters():
        lpips = LPIPS()
    pictures = pictures_of(vae_of(request)[0], lpips)
    if request.recompute:
        pictures.one.recompute()
    return pictures


_METHODS = {"denoising": _denoising, "lcm": _lcm, "dmd": _dmd}
