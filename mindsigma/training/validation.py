"""How good the network is by now: loss on held-out data at fixed timesteps and noise, images of fixed prompts."""

from contextlib import contextmanager

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindsigma.data import Loader
from mindsigma.sampling.schedule import NUM_TRAIN_STEPS


@contextmanager
def evaluating(training):
    """The network of a TrainingStep out of training mode, with the averaged weights if there are any."""
    objective, averages, own = training.objective, training.averages(), {}
    if averages:
        own = training.weights() or {parameter.name: Tensor(parameter) for parameter in training.parameters}
    objective.set_learning(False)
    try:
        training.show(averages)
        yield objective.dit
    finally:
        training.show(own)
        objective.set_learning(True)


class HeldOutLoss:
    """Mean loss over held-out records, each at `points` fixed timesteps, the same at every call.

    Args:
        source: Records or FeatureSet.
        sampler: BucketSampler over it, whose batches are shared by the processes.
        inputs: StepInputs.
        collectives: Collectives.
        points: timesteps a record, spread evenly over the schedule.
        batches: number of global batches; None: an epoch.
        loader_options: of Loader; captions and conditions are not dropped.
    """

    def __init__(self, source, sampler, inputs, collectives, points=4, batches=None, **loader_options):
        ranks = collectives.ranks
        self.collectives, self.inputs, self.points = collectives, inputs, points
        self.batches = min(batches or sampler.steps_per_epoch, sampler.steps_per_epoch)
        options = {**loader_options, "caption_dropout": 0.0, "flip": 0.0, "condition_dropout": 0.0}
        self.loader = Loader(source, sampler, ranks.rank, ranks.count, **options)

    def __call__(self, training):
        """Returns dict of floats: validation_loss and, if it is a sum, its terms as validation_mse and so on."""
        names = training.objective.terms
        sums = np.zeros(len(names) + 1)
        scale = Tensor([1.0], ms.float32)
        with evaluating(training):
            for batch in self.loader.batches(0, self.batches):
                rows = len(batch.draws)
                for fixed in self.inputs.fixed(batch, self._timesteps(batch.draws)):
                    terms = training.loss(scale, *fixed)[1 : 1 + len(names)]
                    sums += [*(float(term) * rows for term in terms), rows]
        *totals, count = self.collectives.total(sums)
        means = {f"validation_{name}": total / count for name, total in zip(names, totals)}
        return {"validation_loss": sum(totals) / count, **means}

    def _timesteps(self, draws):
        """List of int arrays (n,): every draw has its own timesteps, one in each of `points` equal ranges."""
        result = []
        for point in range(self.points):
            place = (draws * self.points + point) * 0.6180339887498949 % 1.0  # the golden ratio spreads them evenly
            result.append(((point + place) / self.points * NUM_TRAIN_STEPS).astype(np.int64))
        return result


class SampleImages:
    """Images of fixed prompts from fixed seeds.

    Args:
        pipeline: PixArtSigmaPipeline around the network that is trained.
        prompts: list of texts.
        draws: whether this process draws, or only takes part in gathering what the processes divide.
        controls: list of pictures that a ControlNet of the pipeline takes, one for each prompt or one for all; or none.
        options: keyword arguments of the pipeline's call, such as height, num_inference_steps and seed.
    """

    def __init__(self, pipeline, prompts, draws=True, controls=(), **options):
        self.pipeline, self.prompts, self.draws, self.options = pipeline, list(prompts), draws, options
        several = [controls[i % len(controls)] for i in range(len(prompts))] if controls else []
        self.controls = [{"control_image": one} for one in several] or [{}] * len(self.prompts)

    def __call__(self, training):
        """Returns a list of PIL images, an empty one if this process does not draw. Every process calls it."""
        with evaluating(training):
            return [
                self.pipeline([prompt], progress=False, output_type="pil", **self.options, **control).images[0]
                for prompt, control in (zip(self.prompts, self.controls) if self.draws else ())
            ]
