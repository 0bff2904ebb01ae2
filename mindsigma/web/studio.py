"""Drawings of several users on one device: a queue, one thread that draws, events for each user, cancelling."""

import io
import queue
import threading
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any, Optional, Tuple

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.web.limits import LARGEST_SEED, Limits

UPLOADED = "uploaded picture"  # in the place of a file's name, which is never taken from a user


@dataclass(frozen=True)
class Order:
    """What a user asks for; every value is checked when it is submitted.

    Attributes:
        prompt, negative: texts.
        options: dict of fields of SamplingOptions.
        seed: of the first picture, the others count on. pictures: how many.
        model: label of a model of the studio. adapters: tuple of (label, weight).
        image, mask: PIL images to draw from, or None.
        ratio: height / width of the picture, in place of a height and a width among the options.
        control: label of a ControlNet, or "". control_image: PIL image that it takes.
        condition: what is first made of that image, of choices.CONDITIONS; "": nothing.
    """

    prompt: str
    negative: str = ""
    options: dict = field(default_factory=dict)
    seed: int = 0
    pictures: int = 1
    model: str = ""
    adapters: Tuple = ()
    image: Any = None
    mask: Any = None
    ratio: Optional[float] = None
    control: str = ""
    control_image: Any = None
    condition: str = ""


@dataclass(frozen=True)
class Waiting:
    """Drawings that come before this one."""

    before: int


@dataclass(frozen=True)
class Loading:
    """The model's weights are being read."""


@dataclass(frozen=True)
class Step:
    """A step is done: of picture `picture` (from 1) of `pictures`; preview: PIL image or None."""

    step: int
    steps: int
    picture: int
    pictures: int
    preview: Any = None


@dataclass(frozen=True)
class Picture:
    """A picture is ready: PIL image, the bytes of its PNG with all that it tells, its seed."""

    image: Any
    png: bytes
    seed: int
    told: dict


@dataclass(frozen=True)
class Ended:
    """Nothing more comes.

    Attributes:
        error: what went wrong, one line, or "".
        cancelled: whether the user asked for the end.
        notes: lines about what was done to the given pictures.
    """

    error: str = ""
    cancelled: bool = False
    notes: Tuple[str, ...] = ()


class Cancelled(Exception):
    """The user asked for the end."""


class Ticket:
    """A place in the queue.

    Args:
        order: Order. user: what tells users apart.
    """

    def __init__(self, order, user):
        self.order, self.user = order, user
        self._events, self._cancelled = queue.SimpleQueue(), threading.Event()

    def put(self, event):
        """Tell the user."""
        self._events.put(event)

    def cancel(self):
        """End the drawing after the step that it is at."""
        self._cancelled.set()

    @property
    def cancelled(self):
        """Whether it was asked to end."""
        return self._cancelled.is_set()

    def events(self):
        """All events until Ended; who stops listening cancels the drawing."""
        try:
            while True:
                event = self._events.get()
                yield event
                if isinstance(event, Ended):
                    return
        finally:
            self.cancel()


class Studio:
    """Draws for several users, one after the other, in a thread of its own.

    Args:
        open_model: function of a label that returns a PixArtSigmaPipeline; called in the thread that draws.
        models: labels. adapters, controls: dict label -> path, adapters and ControlNets that users may choose; the
            latter are those that `open_model` opens a pipeline with, in their order.
        limits: Limits.
        preview_every: steps between two previews; 0: none.
        samplers: dict label of a model -> fields of SamplingOptions that it was distilled for; the others have dpm.
    """

    def __init__(
        self, open_model, models, adapters=None, limits=None, preview_every=1, controls=None, samplers=None
    ):  # fmt: skip
        self.models, self.adapters, self.controls = list(models), dict(adapters or {}), dict(controls or {})
        self._samplers = dict(samplers or {})
        self.limits, self._open_model, self._every = limits or Limits(), open_model, preview_every
        self._ready = threading.Condition()
        self._waiting, self._current = deque(), None
        self._label = self._pipeline = self._preview = self._digests = None
        self._closing = False
        self._opened, self._fault = threading.Event(), None
        self._thread = threading.Thread(target=self._run, daemon=True, name="studio")
        self._thread.start()

    def open_first(self):
        """Wait until the first model is open. Raises MindSigmaError where it cannot be opened."""
        self._opened.wait()
        if self._fault is not None:
            raise self._fault

    def close(self):
        """End all drawings and the thread; a process that ends while it draws would end in an abort."""
        with self._ready:
            self._closing = True
            for ticket in self._tickets():
                ticket.cancel()
            self._ready.notify()
        self._thread.join()

    def sampler_of(self, model):
        """Name of the sampler of a model, given by its label."""
        return self._own(model)["sampler"]

    def usual(self, sampler, model=None):
        """(steps, guidance scale) that a sampler takes unless told otherwise, or a model of that sampler, in limits."""
        from mindsigma.sampling import sampler_class

        found, own = sampler_class(sampler), self._own(model)
        own = own if own["sampler"] == sampler else {}
        steps = own.get("num_inference_steps", found.steps)
        return min(steps, self.limits.steps), own.get("guidance_scale", found.guidance)

    def _own(self, model, adapters=()):
        """Fields of SamplingOptions that a model, given by its label, and adapters (label, weight) were made for."""
        from mindsigma.weights.own_sampling import told_by_adapters

        told = told_by_adapters([self.adapters[label] for label, _ in adapters])
        return told or self._samplers.get(model, {"sampler": "dpm"})

    @property
    def waiting(self):
        """Drawings that wait."""
        return len(self._waiting)

    def submit(self, order, user=""):
        """Check an Order and queue it; returns a Ticket. Raises MindSigmaError."""
        order = self._checked(order)
        ticket = Ticket(order, user)
        with self._ready:
            mine = sum(one.user == user and not one.cancelled for one in self._tickets())
            if len(self._waiting) >= self.limits.waiting:
                raise MindSigmaError(f"the queue is full ({self.limits.waiting} drawings wait); try again later")
            if mine >= self.limits.waiting_of_one:
                raise MindSigmaError(f"{mine} of your drawings are not done yet; wait for one, or cancel it")
            self._waiting.append(ticket)
            self._tell_places()
            self._ready.notify()
        return ticket

    def cancel(self, user):
        """End all drawings of a user; returns their number."""
        with self._ready:
            mine = [ticket for ticket in self._tickets() if ticket.user == user]
            for ticket in mine:
                ticket.cancel()
                if ticket in self._waiting:
                    self._waiting.remove(ticket)
                    ticket.put(Ended(cancelled=True))
            self._tell_places()
        return len(mine)

    def needed(self):
        """Lines about the memory that the open model takes: one, or none where nobody asks."""
        from mindsigma.pipeline.memory import told

        return told(self._pipeline, together=True)

    def memory(self):
        """One line: what this process holds of the machine's memory."""
        from mindsigma.pipeline.memory import free_bytes, resident_bytes

        free, held = free_bytes(), resident_bytes()
        share = f" of {(held + free) / 1e9:.1f} GB that it could have" if free is not None else ""
        return f"{held / 1e9:.1f} GB{share}"

    def _tickets(self):
        return [*([self._current] if self._current else []), *self._waiting]

    def _tell_places(self):
        for place, ticket in enumerate(self._waiting):
            ticket.put(Waiting(place + (self._current is not None)))

    def _checked(self, order):
        """The Order with checked values."""
        from mindsigma.arguments import number, whole
        from mindsigma.choices import CONDITIONS
        from mindsigma.data.conditions import Condition
        from mindsigma.sampling.options import SamplingOptions, with_own

        limits = self.limits
        prompt, negative = limits.text("prompt", order.prompt), limits.text("negative prompt", order.negative)
        if not prompt.strip():
            raise MindSigmaError("prompt: tell what to draw")
        model = order.model or self.models[0]
        if model not in self.models:
            raise MindSigmaError(f"model: '{one_line(model)}' is none of this page's")
        adapters = []
        for label, weight in order.adapters:
            if label not in self.adapters:
                raise MindSigmaError(f"adapter: '{one_line(label)}' is none of this page's")
            adapters.append((label, number("weight", weight)))
        values = with_own(self._own(model, adapters), order.options)
        options = SamplingOptions(**values)
        whole("steps", options.num_inference_steps, 1, limits.steps)
        for side in (options.height, options.width):
            if side is not None:
                whole("size", side, 16, 8192, " pixels")
        self._within(options.height or 1, options.width or 1)
        if order.mask is not None and order.image is None:
            raise MindSigmaError("mask: give the picture that it belongs to, too")
        if order.control and order.control not in self.controls:
            raise MindSigmaError(f"ControlNet: '{one_line(order.control)}' is none of this page's")
        if bool(order.control) != (order.control_image is not None):
            raise MindSigmaError("ControlNet: give both it and the picture that it takes")
        control_image = None if order.control_image is None else limits.picture(order.control_image)
        condition = None
        if order.condition and order.condition not in CONDITIONS:
            raise MindSigmaError(f"condition: '{one_line(order.condition)}' is none of this page's")
        if control_image is not None and order.condition:
            condition = Condition.of(order.condition)
            control_image = condition.computed(control_image)
        return replace(
            order,
            prompt=prompt,
            negative=negative,
            options=values,
            seed=whole("seed", order.seed, 0, LARGEST_SEED),
            pictures=whole("pictures", order.pictures, 1, limits.pictures),
            model=model,
            ratio=None if order.ratio is None else number("ratio", order.ratio),
            adapters=tuple(adapters),
            image=None if order.image is None else limits.picture(order.image),
            mask=None if order.mask is None else limits.picture(order.mask),
            control_image=control_image,
            condition=str(condition or ""),
        )

    def _within(self, height, width):
        """Raise for a picture of too many pixels."""
        if height * width > self.limits.pixels:
            raise MindSigmaError(f"size: {height} x {width} are more than {self.limits.pixels:,} pixels")

    def _run(self):
        """The thread that draws."""
        try:
            self._open(self.models[0])
        except Exception as error:
            text = str(error) if isinstance(error, MindSigmaError) else f"{type(error).__name__}: {error}"
            self._fault = MindSigmaError(text)
        self._opened.set()
        while True:
            with self._ready:
                while not self._waiting and not self._closing:
                    self._ready.wait()
                if self._closing:
                    for ticket in self._waiting:
                        ticket.put(Ended(cancelled=True))
                    return
                self._current = ticket = self._waiting.popleft()
                self._tell_places()
            try:
                end = Ended(notes=self._draw(ticket))
            except Cancelled:
                end = Ended(cancelled=True)
            except MindSigmaError as error:
                end = Ended(str(error))
            except Exception as error:  # whatever it is, the next user's drawing must be tried
                end = Ended(one_line(f"unexpected {type(error).__name__}: {error}", 300))
            with self._ready:
                self._current = None
            ticket.put(end)

    def _draw(self, ticket):
        """Draw what is ordered; returns lines about what was done to the given pictures."""
        order = ticket.order
        if ticket.cancelled:
            raise Cancelled
        pipeline = self._model(ticket)
        if order.ratio is not None:
            height, width = pipeline.size_of_ratio(order.ratio)
            self._within(height, width)
            order = replace(order, options={**order.options, "height": height, "width": width})
        options = order.options
        sources = {name: value for name, value in (("image", order.image), ("mask", order.mask)) if value is not None}
        if self.controls:
            sources["control_image"] = [order.control_image if one == order.control else None for one in self.controls]
        for number in range(order.pictures):
            seed = (order.seed + number) % (LARGEST_SEED + 1)
            callback = self._callback(ticket, number + 1)
            result = pipeline(
                order.prompt, order.negative, seed=seed, progress=False, callback_on_step_end=callback, **sources,
                **options,
            )  # fmt: skip
            ticket.put(self._picture(order, result.images[0], seed, result.drawn_size))
        return self._notes(order, sources)

    def _notes(self, order, sources):
        """What became of the pictures that an order gives: a tuple of lines."""
        from mindsigma.sampling.options import SamplingOptions

        options, pipeline = SamplingOptions(**order.options), self._pipeline
        source = pipeline.open_images(order.image, order.mask, options)
        lines = [] if source is None else source.told()
        for given in pipeline.open_control_images(sources.get("control_image"), options, source):
            lines += [] if given is None else given.told("the ControlNet's picture")
        return tuple(lines)

    def _model(self, ticket):
        """The pipeline of an order, with its adapters."""
        from mindsigma.web.preview import Preview

        order = ticket.order
        if self._label != order.model:
            ticket.put(Loading())
            self._open(order.model)
        if order.adapters not in self._dits:
            lora = [(self.adapters[label], weight) for label, weight in order.adapters]
            self._dits = {(): self._dits[()], order.adapters: self._pipeline.with_lora(lora)}
        self._pipeline.use(self._dits[order.adapters])
        if self._preview is None and self._every:
            self._preview = Preview(self._pipeline)
        return self._pipeline

    def _open(self, label):
        """Open a model; the one before is gone first."""
        from mindsigma.weights.digests import Digests
        from mindsigma.weights.locate import locate

        self._label = self._pipeline = self._preview = None
        self._pipeline = self._open_model(label)
        self._label, self._dits = label, {(): self._pipeline.components.opened("dit")}
        files = {name: path for name, path in self._pipeline.files.items() if name not in self._pipeline.controlnets}
        files.update((f"lora: {label}", locate(path)) for label, path in self.adapters.items())
        self._digests = Digests({**files, **{f"controlnet: {label}": path for label, path in self.controls.items()}})

    def _callback(self, ticket, picture):
        order = ticket.order

        def callback(pipeline, step, timestep, values):
            if ticket.cancelled:
                raise Cancelled
            preview = None
            if self._every and step % self._every == 0:
                preview = self._preview(values["clean"]()[:1])
            ticket.put(Step(step + 1, self._steps(order), picture, order.pictures, preview))

        return callback

    def _steps(self, order):
        from mindsigma.sampling.options import SamplingOptions

        return SamplingOptions(**order.options).num_inference_steps

    def _picture(self, order, image, seed, drawn):
        """Picture with its PNG, which tells how to draw it again; drawn: (height, width) that the model worked at."""
        from mindsigma.pipeline.metadata import again, texts
        from mindsigma.pipeline.pictures import png_texts
        from mindsigma.sampling.options import SamplingOptions

        options = SamplingOptions(**order.options)
        digests = self._digests.result()
        chosen = {f"lora: {label}" for label, _ in order.adapters} | {f"controlnet: {order.control}"}
        mine = [name for name in digests if not name.startswith(("lora: ", "controlnet: ")) or name in chosen]
        digests = {name: digests[name] for name in mine}
        lora = [f"{label}:{weight:g}" for label, weight in order.adapters]
        given = {name: UPLOADED for name in ("image", "mask") if getattr(order, name) is not None}
        if order.control:
            given.update(controlnet=[order.control], control_image=[UPLOADED])
        values = again(
            options, order.prompt, seed, negative_prompt=order.negative, model=order.model, lora=lora or None, **given
        )
        about = {
            "model": order.model,
            "components": order.model,
            "lora": ", ".join(lora),
            "dtype": self._pipeline.dtype_name,
            "convention": self._pipeline.convention,
            **({} if order.image is None else options.image_metadata(order.mask is not None)),
            **({"controlnet": order.control, "condition": order.condition} if order.control else {}),
            **(options.control_metadata() if order.control else {}),
        }
        told = texts(
            order.prompt, order.negative, seed, options, image.size, drawn[::-1], about, digests, values
        )  # fmt: skip
        file = io.BytesIO()
        image.save(file, "PNG", pnginfo=png_texts(told))
        return Picture(image, file.getvalue(), seed, told)
