"""Training of a ControlNet: the ordinary loss of a frozen network, beside which copies of its first blocks learn.

The latents of the condition are drawn anew from the VAE's posterior at every step, like those of the image.
"""

import mindspore as ms

from mindsigma.backends.cpu import accelerate
from mindsigma.data import FeatureSet
from mindsigma.data.conditions import Condition
from mindsigma.errors import MindSigmaError
from mindsigma.models.controlnet import ControlledDiT, ControlNet
from mindsigma.training.inputs import StepInputs, tensor
from mindsigma.training.learner import ControlNetLearner
from mindsigma.training.loss import Denoising, LossConfig, noisy_latents
from mindsigma.training.method import Method, digest_of
from mindsigma.training.needed import frozen, learning, weights_of
from mindsigma.weights.loading import load_controlnet

CONDITION_AT = 6  # place of the condition's latents among the inputs of the objective


class ControlledDenoising(Denoising):
    """The loss of a DiT that is guided by a ControlNet.

    Args:
        dit: DiT, frozen, in training mode.
        controlnet: ControlNet that learns, in training mode.
    """

    def __init__(self, dit, controlnet):
        super().__init__(dit)
        self.controlled = ControlledDiT(dit, controlnet)

    def set_learning(self, learning):
        """See Objective."""
        self.controlled.set_train(learning)

    def construct(
        self, clean, noise, numbers, timestep, states, mask, condition, image_size=None, aspect_ratio=None
    ):  # fmt: skip
        """Squared error and bound of a micro-batch; see Denoising. `condition`: (N, c, h, w) fp32, scaled latents."""
        noisy = noisy_latents(clean, noise, numbers)
        output = self.controlled(noisy, condition, timestep, states, mask, image_size, aspect_ratio)
        return self.terms_of(output, clean, noisy, noise, numbers)


class ControlInputs(StepInputs):
    """Makes micro-batches of ControlledDenoising."""

    def tensors(self, batch, rows, clean, timestep, text, weight=1.0):
        """See StepInputs."""
        arrays = super().tensors(batch, rows, clean, timestep, text, weight)
        return (*arrays[:CONDITION_AT], tensor(self.condition(batch, rows)), *arrays[CONDITION_AT:])

    def condition(self, batch, rows):
        """Scaled latents of the conditions, float32 (n, c, h, w): zeros where they are dropped."""
        moments, images = batch.control_moments, batch.control_images
        latents = self.drawn_latents(moments, images, batch.draws, rows, "posterior of the condition")
        latents[batch.control_dropped[rows]] = 0.0
        return latents


class ControlNetTraining(Method):
    """Training of a ControlNet."""

    freezes = True

    @classmethod
    def check(cls, args):
        """See Method."""
        for name in ("fresh", "kv_compression", "grow_to", "lora_rank", "init_lora", "class_data", "class_prompt"):
            if getattr(args, name):
                raise MindSigmaError(
                    f"--{name.replace('_', '-')}: a ControlNet learns beside --model as it is; train that first"
                )
        if args.zero == 3:
            raise MindSigmaError("--zero 3 divides the weights of --model, which stay as they are here: use --zero 2")
        if args.evaluate:
            raise MindSigmaError("--evaluate draws without a condition: it would score --model, which stays as it is")
        if args.init_controlnet and args.controlnet_layers:
            raise MindSigmaError("--init-controlnet tells its blocks itself: leave out --controlnet-layers")
        Condition.of(args.condition, args.condition_folder)
        controls, prompts = len(args.control_images), len(args.prompts)
        if controls not in ((1, prompts) if prompts else (0,)):
            raise MindSigmaError(f"{controls} --control-images for {prompts} --prompts; give one, or one for each")

    def loading(self):
        """See Method."""
        args = self.args
        source, self.condition = self.run.source, Condition.of(args.condition, args.condition_folder)
        if isinstance(source, FeatureSet):
            if self.condition is not None:
                raise MindSigmaError(f"{source.path}: features hold their conditions; leave out --condition")
            if not source.has_condition:
                raise MindSigmaError(
                    f"{source.path}: holds no conditions; extract them with tools/extract_features.py --condition"
                )
        elif self.condition is None:
            raise MindSigmaError("a ControlNet needs --condition or --condition-folder, or features that hold them")
        return {"condition": self.condition, "condition_dropout": args.condition_dropout}

    def needed(self, component, dtype):
        """See Method: copies are counted as their share of the network's blocks, --init-controlnet's as the default."""
        args, numbers, depth = self.args, weights_of(component), component.config.depth
        layers = args.controlnet_layers or max(depth // 2 - 1, 1)
        return frozen(numbers, dtype) + learning(args, numbers * layers / depth, processes=self.run.ranks.count)

    def learner(self, component):
        """See Method: the network is frozen, the ControlNet that stands beside it learns."""
        dit, args = self.run.dit, self.args
        self.base_digest = digest_of(dit)
        for parameter in dit.get_parameters():
            parameter.requires_grad = False
        first = load_controlnet(args.init_controlnet, "fp32", dit) if args.init_controlnet else None
        layers = first.config.layers if first else args.controlnet_layers or max(dit.config.depth // 2 - 1, 1)
        self.controlnet = ControlNet.from_dit(dit, layers, ms.float32, args.fp32_attention)
        if first:
            values = dict(first.parameters_and_names())
            for name, parameter in self.controlnet.parameters_and_names():
                parameter.set_data(values[name])
        accelerate(self.controlnet.set_train())
        return ControlNetLearner(self.controlnet)

    def build(self):
        """See Method."""
        args, run = self.args, self.run
        if args.recompute:
            for block in self.controlnet.blocks:
                block.recompute()
        self.loss = LossConfig(run.dit.config.learn_sigma, args.snr_loss, args.loss_weighting, args.snr_gamma)
        objective = ControlledDenoising(run.dit, self.controlnet)
        self.training = self.step_of(objective, run.learner.parameters, args.ema_decay)
        self.inputs = self.inputs_of(ControlInputs, self.loss, run.source, args.seed)

    def controlnets(self):
        """See Method."""
        return [self.controlnet]

    def identity(self):
        """See Method."""
        return {
            "base": self.base_digest,
            "controlnet_layers": self.controlnet.config.layers,
            "condition": str(self.condition or self.run.source.config["condition"]),
            "condition_dropout": self.args.condition_dropout,
            "init_controlnet": self.args.init_controlnet,
        }
