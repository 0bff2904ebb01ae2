"""The ordinary training: predict the noise in noisy latents; with prior preservation (DreamBooth) where asked for."""

import mindspore as ms

from mindsigma.errors import MindSigmaError
from mindsigma.ops.operators import fused
from mindsigma.training.inputs import StepInputs
from mindsigma.training.learner import WholeLearner
from mindsigma.training.loss import Denoising, LossConfig
from mindsigma.training.method import Method
from mindsigma.training.needed import learning, weights_of
from mindsigma.training.prior import DRAWN, class_micro_batches, draw_class_images

CLASS_DATA = "class_data.safetensors"  # what the run draws from
CONTROLNET = (
    "controlnet_layers", "init_controlnet", "condition", "condition_folder", "condition_dropout", "control_images",
)  # fmt: skip


class Training(Method):
    """Training by denoising."""

    @classmethod
    def check(cls, args):
        """See Method."""
        for name in CONTROLNET:
            if getattr(args, name):
                raise MindSigmaError(f"--{name.replace('_', '-')} belongs to --method controlnet")
        if args.class_count < 1:
            raise MindSigmaError(f"--class-count must be at least 1, not {args.class_count}")
        if not 0 <= args.prior_weight < float("inf"):
            raise MindSigmaError(f"--prior-weight must be a number of at least 0, not {args.prior_weight}")

    def needed(self, component, dtype):
        """See Method."""
        if self.run.adapting:
            return super().needed(component, dtype)
        dtype = dtype if self.has_masters() else ms.float32
        return learning(self.args, weights_of(component), dtype, self.run.ranks.count)

    def has_masters(self):
        """Whether weights of half precision have masters.

        Without a graph MindSpore gives weights that a recomputed block has beside its `construct`, such as those for
        the caption, gradients of the dtype that they were made with: there they stay fp32.
        """
        return fused() or not self.args.recompute

    def begin(self):
        """Draw the class's images that are missing."""
        args, run = self.args, self.run
        self.class_data = args.class_data or (str(run.folder / DRAWN) if args.class_prompt else None)
        if args.class_prompt and run.ranks.first:
            run.say(f"{args.class_count} images of {args.class_prompt!r} in {self.class_data}, drawn unless there")
            options = run.sampling_options(height=args.resolution, width=args.resolution)
            run.dit.set_train(False)
            draw_class_images(run.pipeline(), self.class_data, args.class_prompt, args.class_count, **options)
            run.dit.set_train(True)
        run.collectives.barrier()

    def build(self):
        """See Method."""
        args, run = self.args, self.run
        self.loss = LossConfig(run.dit.config.learn_sigma, args.snr_loss, args.loss_weighting, args.snr_gamma)
        self.prior = run.record_list(self.class_data, CLASS_DATA) if self.class_data else None
        batches = 2 if self.prior else 1
        # Another network of the objective would share the weights that masters change; an adapter's are fp32 anyway.
        whole = isinstance(run.learner, WholeLearner) and self.has_masters()
        self.training = self.step_of(Denoising(run.dit), run.learner.parameters, args.ema_decay, batches, whole)
        self.inputs = self.inputs_of(StepInputs, self.loss, run.source, args.seed)
        if self.prior:
            # Of another seed, as the numbers of the draws are the same.
            seed = (args.seed + 1) % 2**64
            _, self.prior_loader = run.sampled(self.prior, seed)
            self.prior_inputs = self.inputs_of(StepInputs, self.loss, self.prior.source, seed)

    def loaders(self):
        """See Method."""
        return [self.run.loader, self.prior_loader] if self.prior else [self.run.loader]

    def lists(self):
        """See Method."""
        return {"class_data": self.prior} if self.prior else {}

    def micro_batches(self, batch, class_batch=None):
        """See Method."""
        count = self.args.accumulation
        if class_batch is None:
            return self.inputs.micro_batches(batch, count)
        return class_micro_batches(
            lambda weight: self.inputs.micro_batches(batch, count, weight),
            lambda weight: self.prior_inputs.micro_batches(class_batch, count, weight),
            self.args.prior_weight,
        )
