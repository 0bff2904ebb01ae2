"""What a method of training decides: its options, its objective, what it makes of a batch, what a checkpoint holds."""

import hashlib
from dataclasses import dataclass, field
from typing import Dict

import mindspore as ms
import numpy as np

from mindsigma.backends.cpu.step import accelerate_step
from mindsigma.data import FeatureSet
from mindsigma.errors import MindSigmaError
from mindsigma.training.checkpoints import Contents
from mindsigma.training.learner import AdapterLearner, WholeLearner
from mindsigma.training.needed import frozen, learning, weights_of
from mindsigma.training.optimizers import OptimizerConfig
from mindsigma.training.step import StepConfig, TrainingStep

FIRST_LOSS_SCALE = 65536.0


@dataclass
class Outcome:
    """What a step of one process tells.

    Attributes:
        terms: name -> mean over this process's rows, of which the loss is the sum.
        beside: name -> mean over this process's rows, of other losses.
        norms: name -> norm of a gradient, that of all processes.
    """

    terms: Dict[str, float]
    norms: Dict[str, float]
    beside: Dict[str, float] = field(default_factory=dict)


class Method:
    """The base of all: one network learns by one objective.

    Args:
        run: Trainer. When `build` is called its data, network and learner are there.

    Attributes:
        training: TrainingStep of the network that learns, after `build`.
        inputs: StepInputs that make its micro-batches, after `build`.
    """

    freezes = False  # whether the network that the run begins from stays as it is

    @classmethod
    def check(cls, args):
        """Raise MindSigmaError for options that cannot be meant."""

    def __init__(self, run):
        self.run, self.args = run, run.args

    def loading(self):
        """dict of options of Loader, beside those of every run."""
        return {}

    def needed(self, component, dtype):
        """Needed for the network of a Component whose activations have this dtype; an adapter's own weights are few."""
        run, numbers = self.run, weights_of(component)
        return frozen(numbers, dtype) if run.adapting else learning(self.args, numbers, processes=run.ranks.count)

    def begin(self):
        """What is done with the network as it is before training, without its adapter."""

    def learner(self, component):
        """What learns, of training/learner.py: an adapter if one is asked for, else all weights of the network.

        `component`: Component that the network was made of.
        """
        run = self.run
        if run.adapting:
            return AdapterLearner(run.dit, run.new_adapter())
        return WholeLearner(run.dit, run.null_caption[0], component.record)

    def build(self):
        """Make `training` and `inputs`."""
        raise NotImplementedError

    def step_of(self, objective, parameters, ema_decay=0.0, batches=1, masters=False):
        """A TrainingStep with the run's options; `batches`: of how many batches a step takes the micro-batches."""
        args, half = self.args, self.run.dit.dtype == ms.float16
        scale = args.loss_scale if args.loss_scale is not None else (FIRST_LOSS_SCALE if half else 0.0)
        optimizer = OptimizerConfig(args.optimizer, args.betas, args.eps, args.weight_decay)
        config = StepConfig(
            args.accumulation * batches, args.max_norm, ema_decay, scale, zero=args.zero,
            zero_group=args.zero_group or 0, masters=masters,
        )  # fmt: skip
        return accelerate_step(TrainingStep(objective, parameters, optimizer, config, self.run.ranks))

    def inputs_of(self, kind, loss, source, seed):
        """StepInputs, of the class `kind`, for batches of a source."""
        run, args = self.run, self.args
        from_images = not isinstance(source, FeatureSet)
        return kind(
            run.components.opened("vae").config,
            run.null_caption,
            loss,
            args.max_length,
            seed,
            args.null_mask,
            run.components.vae if from_images else None,
            run.components.text_encoder if from_images else None,
            run.dit.config.micro_condition,
        )

    def loaders(self):
        """list of Loader; a step takes a Batch of each."""
        return [self.run.loader]

    def lists(self):
        """dict name -> RecordList of data beside the run's own, whose fingerprints a continuation must find again."""
        return {}

    def identity(self):
        """dict of what else a continuation must agree in, by name."""
        return {}

    def train(self, batches, rate):
        """One step on a Batch of each loader. Returns an Outcome."""
        *terms, norm, _ = self.training.run(self.micro_batches(*batches), rate)
        return Outcome(dict(zip(self.training.objective.terms, terms)), {"grad_norm": norm})

    def micro_batches(self, batch):
        """The batch's micro-batches as `training` takes them."""
        return self.inputs.micro_batches(batch, self.args.accumulation)

    def controlnets(self):
        """list of the ControlNets that guide the images of --prompts."""
        return []

    def sampling(self):
        """dict of fields of SamplingOptions for the images of --prompts, besides those of the run's options."""
        return {}

    def own_sampling(self):
        """Fields of SamplingOptions with which what is learnt is to be sampled; {}: as any other model."""
        return {}

    def steps(self):
        """dict name -> TrainingStep of all that learn; that of the run's network has the name ""."""
        return {"": self.training}

    def contents(self):
        """Contents of a checkpoint."""
        learner, training = self.run.learner, self.training
        products = {learner.product: (learner, training.weights())}
        if training.config.ema_decay > 0:
            products[learner.average] = learner, training.averages()
        return Contents(
            products,
            training.own_states(),
            training.shares.stage > 0,
            lambda: training.show(training.weights()),
        )


class Distillation(Method):
    """The base of methods that make a faster network of a teacher, which is the one that the run begins from."""

    @classmethod
    def check(cls, args):
        """See Method."""
        for name in ("fresh", "kv_compression", "grow_to"):
            if getattr(args, name):
                raise MindSigmaError(f"--{name.replace('_', '-')}: the teacher is --model as it is; train that first")
        if args.zero == 3:
            raise MindSigmaError("--zero 3 is of tools/train.py, as distillation has other networks too: use --zero 2")

    def begin(self):
        """Note which teacher it is, as a continuation must have the same."""
        self.teacher_digest = digest_of(self.run.dit)

    def identity(self):
        """See Method."""
        return {"teacher": self.teacher_digest}


def digest_of(network):
    """Text that differs where a network's weights differ."""
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in network.parameters_and_names():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(parameter.float().asnumpy()))
    return digest.hexdigest()
