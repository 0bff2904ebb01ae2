"""The training run: puts data, network, step, checkpoints and reports together, and loops."""

import contextlib
import json
import time
from dataclasses import replace
from pathlib import Path

import mindspore as ms
import numpy as np

from mindsigma.data import BucketSampler, FeatureSet, Loader, Resolution, open_data
from mindsigma.data.aspect_ratio import INPUT_SIZES
from mindsigma.distributed import Collectives, join_ranks, set_from_rank
from mindsigma.errors import MindSigmaError, one_line, say
from mindsigma.heartbeat import RUNNING, beat
from mindsigma.pipeline import memory
from mindsigma.pipeline.components import Components, Held
from mindsigma.pipeline.metadata import KEY, texts
from mindsigma.pipeline.pictures import save_png
from mindsigma.pipeline.pipeline import PixArtSigmaPipeline
from mindsigma.progress import duration
from mindsigma.runtime import resolve_dtype, set_device
from mindsigma.sampling.options import OWN, SamplingOptions
from mindsigma.training import needed
from mindsigma.training.checkpoints import RunCheckpoints, read_state
from mindsigma.training.learner import WholeLearner
from mindsigma.training.learning_rate import learning_rate, scaled_rate
from mindsigma.training.lora import TARGETS, AdapterConfig, new_adapter
from mindsigma.training.methods import method_of
from mindsigma.training.model_card import model_card
from mindsigma.training.record_list import open_list
from mindsigma.training.run_log import Report
from mindsigma.training.run_options import FREE, MAY_CHANGE, PLANNED, REASONS, check
from mindsigma.training.start import build_dit, open_start
from mindsigma.training.text_evaluation import TextEvaluation
from mindsigma.training.times import Times
from mindsigma.training.trackers import open_tracker
from mindsigma.training.updates import GOOD_STEPS, SCALE, SKIPPED, SKIPPED_IN_A_ROW
from mindsigma.training.validation import HeldOutLoss, SampleImages
from mindsigma.weights.adapters.merging import open_finite_adapter
from mindsigma.weights.formats.atomic import naming, write_json
from mindsigma.weights.locate import locate

OPTIONS = "options.json"
RANKS = "ranks.jsonl"  # which process was the slowest, and what took its time
DATA = "data.safetensors"  # what the run draws from

MOST_NAMED = 8  # samples that a message names

OTHERWISE = "the run would not be the one that it began as"

# What a continuation must agree in, where that is not the option of the same name.
NAMES = {
    "batch": "a batch (--batch-size x --accumulation x processes) of",
    "data": "data (captions, sizes, order) of the fingerprint",
    "teacher": "a teacher (--model) of the fingerprint",
    "base": "a network (--model) of the fingerprint",
    "lpips": "LPIPS and a VAE (--lpips-weights, --components) of the fingerprint",
}


def fitting(batch, processes):
    """How so many processes take the batch of a run, which keeps its order whatever their number; a text."""
    if batch % processes == 0:
        return f"{processes} processes take it with --batch-size x --accumulation = {batch // processes}"
    fits = max(count for count in range(1, processes) if batch % count == 0)
    return f"{processes} processes cannot share it equally, {fits} can"


class Trainer:
    """A run; what is learned, and how, is its Method's.

    Args:
        args: namespace of run_options.build_parser or distill_options.build_parser.
        stop: callable that tells whether the run was asked to end; it then saves and leaves.
    """

    def __init__(self, args, stop=lambda: False):
        self.args, self.stop = args, stop
        check(args)
        beat(RUNNING, 0, "starting")
        set_device(args.device)
        self.ranks = join_ranks()
        self.collectives = Collectives(self.ranks)
        self.folder = Path(args.output)
        self.checkpoints = RunCheckpoints(self.folder / "checkpoints", args.keep, self.collectives)
        self.method = method_of(args)(self)
        self._open_data()
        self._build_network()
        self.method.build()
        self.training = self.method.training
        self.base_rate = scaled_rate(args.learning_rate, self.batch, args.auto_lr)
        self.step = self._resume()
        self._build_validation()

    def say(self, *lines):
        """Print lines, once for all processes."""
        if self.ranks.first:
            say(*lines)

    def _open_data(self):
        args = self.args
        self.resolution = Resolution(args.resolution, args.multi_scale, args.table)
        self.records = self.record_list(args.data, DATA)
        self.source = self.records.source
        self.batch = args.batch_size * args.accumulation * self.ranks.count
        self.loading = {
            "seed": args.seed,
            "real_prompt_ratio": args.real_prompt_ratio,
            "max_length": args.max_length,
            "threads": args.threads,
            "max_bad_images": args.max_bad_images,
            **self.method.loading(),
        }
        self.sampler, self.loader = self.sampled(self.records, args.seed)
        self.say(*str(self.sampler.summary()).split("\n"))

    def record_list(self, path, name):
        """RecordList or VersionList of a data set that is trained on."""
        resumed = bool(self.checkpoints.steps()) and not self.args.overwrite
        records = open_list(open_data(path), self.folder / name, resumed, self.args.accept_new_data)
        if records.new:
            self.say(f"{path}: {records.new} records are new; the batches from here on are drawn from all of them")
        elif records.gone:
            self.say(f"{path}: {records.gone} records of the run are gone; others of their buckets take their places")
        return records

    def sampled(self, records, seed):
        """BucketSampler and Loader of a RecordList."""
        args = self.args
        sampler = BucketSampler(records, self.batch, self.resolution, seed, args.incomplete)
        chances = {"caption_dropout": args.caption_dropout, "flip": args.flip}
        options = {**self.loading, **chances, "seed": seed, "places": records.places}
        return sampler, Loader(records.source, sampler, self.ranks.rank, self.ranks.count, **options)

    def _build_network(self):
        args = self.args
        known = {
            name: getattr(args, name) for name in ("input_size", "pe_interpolation") if getattr(args, name) is not None
        }
        changes = {name: getattr(args, name) for name in ("kv_compression", "kv_init", "grow_to", "position_scale")}
        component = open_start(args.model, changes, **known)
        self.components = Components.of_folder(args.components or args.model)
        for line in component.record:
            self.say(f"changed: {line}")
        base = component.config.input_size * self.components.opened("vae").config.downsampling
        if base != args.resolution:
            self.say(
                f"note: the network's base resolution is {base} px, the data's {args.resolution}; "
                "--grow-to moves the network's"
            )
        dtype = resolve_dtype(args.dtype)
        self.adapting = args.lora_rank is not None or args.init_lora
        self.say(*needed.told(self.method.needed(component, dtype), self._encoders()))
        self.dit = build_dit(
            component.config,
            dtype,
            args.fp32_attention,
            None if args.fresh else component,
            args.seed,
            dtype if self.adapting or self.method.freezes else ms.float32,
        )
        self.null_caption = self._null_caption(component)
        self.method.begin()
        self.learner = self.method.learner(component)
        self.learner.sampling = self.method.own_sampling()
        if type(self.learner) is not WholeLearner:
            self.say(self.learner.summary())
        if args.recompute:  # after the adapter is in: MindSpore knows the parameters of this moment only
            for block in self.dit.blocks:
                block.recompute()
        set_from_rank(0, self.learner.parameters, self.collectives)

    def _encoders(self):
        """list of (name, bytes) of T5 and VAE, if the run encodes images or draws some."""
        args, path = self.args, self.components.path
        drawn = args.prompts or args.evaluate or getattr(args, "class_prompt", None)
        if isinstance(self.source, FeatureSet) and not drawn or not (path / "text_encoder").is_dir():
            return []
        return [(memory.NAMES[name], memory.weight_bytes(self.components.opened(name))) for name in ("t5", "vae")]

    def new_adapter(self):
        """The Adapter that is trained, as it is at the start."""
        args = self.args
        if args.init_lora:
            return open_finite_adapter(locate(args.init_lora)).adapter
        config = AdapterConfig(
            args.lora_rank, args.lora_alpha, tuple(args.lora_targets or TARGETS), args.rslora, args.dora
        )
        return replace(new_adapter(self.dit, config, args.seed), path=Path(args.model))

    def _null_caption(self, component):
        """States (max_length, d) of the null caption and the number of its tokens.

        As the official loader has it, T5 of the empty prompt takes the place of what a checkpoint stores.
        """
        length = self.args.max_length
        if isinstance(self.source, FeatureSet):
            states, mask = self.source.null_caption(length)
            caption = np.asarray(states, np.float32), int(np.sum(mask))
        elif (self.components.path / "text_encoder").is_dir():
            caption = self.components.text_encoder.empty_prompt(length)
        else:
            raise MindSigmaError(
                f"{self.components.path}: has no text_encoder, which captions need; give --components a folder with "
                "T5, or train from features (tools/extract_features.py)"
            )
        width, wanted = caption[0].shape[1], component.config.caption_channels
        if width != wanted:
            raise MindSigmaError(
                f"{component.path}: the network takes captions of {wanted} channels, T5's states have {width}; "
                "give --components or features of the T5 that belongs to it"
            )
        return caption

    def _resume(self):
        """Step that the run goes on from, 0 for a new one."""
        options = {name: value for name, value in vars(self.args).items() if name not in FREE}
        options.update(batch=self.batch, data=self.records.fingerprint)
        options.update({name: records.fingerprint for name, records in self.method.lists().items()})
        options.update(self.method.identity())
        if self.sampler.order:
            options["order"] = self.sampler.order
        self.identity, self.changes = json.loads(json.dumps(options)), []
        if self.args.overwrite:
            self.checkpoints.clear()
        path = self.checkpoints.latest()
        step = self._restore(path) if path else 0
        if self.ranks.first:
            write_json(self.folder / OPTIONS, vars(self.args))
            for records in (self.records, *self.method.lists().values()):
                records.write()
        return step

    def _restore(self, path):
        with self.checkpoints.readable(path):
            state = read_state(path)
        stored = state["identity"]
        lists = {"data": self.records, **self.method.lists()}
        changed = {name for name in {*stored, *self.identity} if stored.get(name) != self.identity.get(name)}
        allowed = {name for name in changed if self._may_change(name, lists)}
        for name in sorted(changed - allowed):
            what = NAMES.get(name, f"--{one_line(name).replace('_', '-')}")
            then, now = (one_line(repr(table.get(name))) for table in (stored, self.identity))
            why = lists[name].difference if lists.get(name) else ""
            if name == "batch" and type(stored.get(name)) is int:
                why = fitting(stored[name], self.ranks.count)
            why = f" ({why})" if why else ""
            raise MindSigmaError(
                f"{path}: was trained with {what} {then}, not {now}{why}; "
                f"{REASONS.get(name, OTHERWISE)}: use that, another --output, or --overwrite"
            )
        self._record(state, allowed)
        state = self.checkpoints.restore(path, self.method.contents())
        self.say(f"resumed from {path}")
        return state["step"]

    def _may_change(self, name, lists):
        """Whether a continuation may have another value of what a checkpoint tells; lists: RecordLists by name."""
        if name == "order":  # which follows from the number of records
            return self.args.accept_new_data and lists["data"].follows
        return name in MAY_CHANGE or (self.args.accept_new_data and lists.get(name) is not None and lists[name].follows)

    def _record(self, state, allowed):
        """Take up what the checkpoint tells of earlier changes, and add those that this start brings."""
        earlier, plan = state.get("changes"), state.get("plan")
        self.changes = [one for one in earlier if isinstance(one, dict)] if isinstance(earlier, list) else []
        stored = {**(plan if isinstance(plan, dict) else {}), **state["identity"]}
        names = [name for name in PLANNED if name in stored and stored[name] != getattr(self.args, name)]
        for name in sorted(allowed) + names:
            now = self.identity.get(name) if name in allowed else getattr(self.args, name)
            self.changes.append({"step": state["step"], "option": name, "from": stored.get(name), "to": now})
            then = one_line(repr(stored.get(name)), 60)
            self.say(f"changed after step {state['step']}: {name.replace('_', '-')} from {then} to {now!r}")

    def _build_validation(self):
        args = self.args
        self.held_out = self.samples = None
        if args.validation_data:
            source = open_data(args.validation_data)
            batch = args.batch_size * self.ranks.count
            sampler = BucketSampler(source, batch, self.resolution, args.seed)
            self.held_out = HeldOutLoss(
                source,
                sampler,
                self.method.inputs,
                self.collectives,
                args.validation_points,
                args.validation_batches,
                **self.loading,
            )
        if args.prompts:
            options = self.sampling_options(height=args.sample_height, width=args.sample_width)
            draws = self.ranks.first or self.training.shares.stage == 3
            controls = getattr(args, "control_images", [])
            self.samples = SampleImages(self.pipeline(), args.prompts, draws, controls, **options)
        self.texts = None
        if args.evaluate:
            self.texts = TextEvaluation(args.evaluate, self.pipeline(), self.collectives)

    def pipeline(self):
        """PixArtSigmaPipeline around the network that is trained."""
        parts = [self.components.opened(name) for name in ("vae", "t5", "tokenizer")]
        controlnets = [Held(one, str(self.folder)) for one in self.method.controlnets()]
        return PixArtSigmaPipeline(Held(self.dit, self.args.model), *parts, controlnets=controlnets)

    def sampling_options(self, **size):
        """Keyword arguments of the pipeline's call; `size`: height and width."""
        args = self.args
        options = SamplingOptions(
            sampler=args.sample_sampler,
            num_inference_steps=OWN if args.sample_steps is None else args.sample_steps,
            guidance_scale=OWN if args.sample_guidance is None else args.sample_guidance,
            pag_scale=args.sample_pag_scale,
            pag_layers=args.sample_pag_layers,
            max_sequence_length=args.max_length,
            use_resolution_binning=self.dit.config.input_size in INPUT_SIZES,  # others have no table of sizes
            **self.method.sampling(),
            **size,
        )
        options.pag(self.dit.config.depth)
        return {**options.as_arguments(), "seed": args.seed}

    def run(self):
        """Train up to --steps, or until asked to stop. Returns the path of the last checkpoint."""
        args = self.args
        began = time.perf_counter()
        with contextlib.ExitStack() as stack:
            self._report = None
            if self.ranks.first:
                tracker = open_tracker(args.tracker, self.folder, vars(args)) if args.tracker else None
                report = Report(self.folder, args.steps, self.step, args.tensorboard, tracker)
                self._report = stack.enter_context(report)
            saved = self._loop()
            self.checkpoints.finish()
        for loader in self.method.loaders():
            if loader.bad:
                self.say(f"left out: {len(loader.bad)} of {loader.source.path} that cannot be read")
        if saved == args.steps:
            self.say(f"{args.steps} steps in {duration(time.perf_counter() - began)}")
        return self.checkpoints.latest()  # where all processes meet

    def _loop(self):
        """All steps that are left; returns the step of the last checkpoint."""
        args, report, saved, self._seen = self.args, self._report, self.step, set()
        self.times = Times(self.collectives, self.folder / RANKS, self.step)
        if self.step == 0:
            self._validate(0)
        for batches in self.times.of_loader(self._batches()):
            values, stop = self._one_step(batches)
            self.step += 1
            show = self.step % args.log_every == 0 or self.step == args.steps
            if report:
                report.step(self.step, values, self.batch, show)
            if show:
                self.say(*self.times.told(self.step))
            held_out = self._validate(self.step)
            if stop or self.step % args.save_every == 0 or self.step == args.steps:
                if report:
                    report.sync()
                self._save(held_out)
                saved = self.step
                if report:
                    report.curves()
            if stop:
                self.say(f"stopped after step {self.step}, saved; the same command goes on from there")
                break
        return saved

    def _batches(self):
        """Iterate over the tuples of a Batch of each loader, of the steps that are left."""
        streams = zip(*(loader.batches(self.step, self.args.steps) for loader in self.method.loaders()))
        while True:
            beat(RUNNING, self.step, "waiting for data")
            batches = next(streams, None)
            if batches is None:
                return
            beat(RUNNING, self.step, "in a step")
            yield batches
            beat(RUNNING, self.step, "beside the steps")

    def _one_step(self, batches):
        """(values for the log, whether to stop) after a step, the same on every process."""
        args = self.args
        schedule = args.lr_schedule, args.warmup, args.steps, args.lr_final
        rate = learning_rate(self.step, self.base_rate, *schedule)
        size = batches[0].height, batches[0].width
        first = size not in self._seen
        outcome, seconds = self.times.of_step(lambda: self.method.train(batches, rate), self.method.steps(), first)
        if first:
            self._seen.add(size)
            if self._report:
                self._report.compiled(seconds)
                self._report.say(f"bucket {size[0]} x {size[1]}: first step, {duration(seconds)} with compilation")
        means, count = {**outcome.terms, **outcome.beside}, self.ranks.count
        sums = [value / count for value in means.values()] + [self.stop(), sum(batch.replaced for batch in batches)]
        *sums, asked, replaced = self.collectives.total(sums)
        if not np.isfinite(sums).all():
            self._name_broken(outcome.terms)
        means = dict(zip(means, sums))
        values = {"loss": sum(means[name] for name in outcome.terms), **means, **outcome.norms, "lr": rate}
        for name, step in self.method.steps().items():
            values.update(self._controls(name, step))
        if replaced:
            values["replaced"] = int(replaced)
        values["height"], values["width"] = size
        return values, asked > 0

    def _name_broken(self, terms):
        """Say which processes had a loss that is not finite, and of which samples."""
        flags = np.zeros(self.ranks.count)
        flags[self.ranks.rank] = not np.isfinite(list(terms.values())).all()
        for rank in np.flatnonzero(self.collectives.total(flags)):
            names = [name for loader in self.method.loaders() for name in loader.names(self.step, rank)]
            shown = ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" * (len(names) > MOST_NAMED))
            self.say(f"step {self.step + 1}: the loss of process {rank} is not finite; its samples: {shown}")

    def _controls(self, name, step):
        """What the controls of a TrainingStep tell; raises MindSigmaError where too many steps were left out."""
        controls, prefix = step.controls.asnumpy(), f"{name}_" if name else ""
        if controls[SKIPPED_IN_A_ROW] >= self.args.max_skipped:
            raise MindSigmaError(
                f"step {self.step}: the {name}{' ' * bool(name)}gradients were not finite "
                f"{int(controls[SKIPPED_IN_A_ROW])} times in a row (loss scale {controls[SCALE]:g}); lower "
                "--learning-rate, or use --fp32-attention, --dtype bf16 or fp32. The weights are as they were before "
                "these steps; the last checkpoint is good"
            )
        values = {f"{prefix}skipped": int(controls[SKIPPED])}
        if step.config.loss_scale > 0:
            values[f"{prefix}loss_scale"] = float(controls[SCALE])
            values[f"{prefix}good_steps"] = int(controls[GOOD_STEPS])
        return values

    def _validate(self, step):
        """Held-out loss, images and scores of texts where they are due; returns the loss or None."""
        args, loss = self.args, None
        if self.held_out and (step % args.validate_every == 0 or step == args.steps):
            result = self.held_out(self.training)
            loss = result["validation_loss"]
            if self._report:
                self._report.log({"step": step, **result})
                self._report.say(f"step {step}: validation loss {loss:.5f}")
        if self.samples and (step % args.sample_every == 0 or step == args.steps):
            self._draw(step)
        if self.texts and (step % args.evaluate_every == 0 or step == args.steps):
            result = self.texts(self.training)
            if self._report:
                self._report.log({"step": step, **result})
                self._report.say(f"step {step}: F1 of the texts {result['text_f1']:.2f} %")
        return loss

    def _draw(self, step):
        """Images of --prompts; the first process keeps them."""
        images = self.samples(self.training)
        if self._report:
            folder = self.folder / "samples"
            with naming(folder):
                folder.mkdir(exist_ok=True)
            for i, image in enumerate(images):
                save_png(image, folder / f"step_{step:08d}_{i}.png", self._sample_texts(step, i, image))
            self._report.images(step, self.args.prompts, [np.asarray(image) for image in images])
            self._report.say(f"step {step}: images in {folder}")

    def _sample_texts(self, step, i, image):
        """dict of texts: what a sample's PNG tells of its making."""
        options = {**self.samples.options}
        seed = options.pop("seed")
        about = {"model": f"{self.folder}, step {step}", "components": str(self.components.path), "training_step": step}
        size = image.size
        asked = (options[name] for name in ("height", "width", "use_resolution_binning"))
        drawn = self.samples.pipeline.image_size(*asked)
        told = texts(self.args.prompts[i], "", seed, SamplingOptions(**options), size, drawn[::-1], about, {}, {})
        del told[KEY]  # no tool draws it again: the weights of this step may not have been kept
        return told

    def _save(self, held_out):
        plan = {name: getattr(self.args, name) for name in PLANNED}
        state = {"identity": self.identity, "ranks": self.ranks.count, "plan": plan, "changes": self.changes}
        if held_out is not None:
            state["validation_loss"] = held_out
        card = model_card(
            self.args, self.step, self.learner.product, self.identity, len(self.records.source), self.changes, held_out,
            self.learner.summary(), self.learner.sampling,
        )  # fmt: skip
        beat(RUNNING, self.step, "saving")
        self.checkpoints.save(self.step, self.method.contents(), state, card, self.args.save_in_background)
