"""The page: what users see and touch, in gradio. Every value that comes from there is checked by the Studio."""

import html
import os
import secrets
import shutil
import tempfile
import threading
import warnings
from pathlib import Path

from mindsigma.choices import CONDITIONS, FAST
from mindsigma.errors import MindSigmaError, one_line
from mindsigma.sampling import SAMPLERS
from mindsigma.web.limits import LARGEST_SEED, Limits
from mindsigma.web.studio import Ended, Loading, Order, Picture, Step, Studio, Waiting

RATIOS = {"1:1": 1.0, "3:2": 2 / 3, "2:3": 3 / 2, "4:3": 3 / 4, "3:4": 4 / 3, "16:9": 9 / 16, "9:16": 16 / 9}
NO_CONTROL, AS_IT_IS = "none", "nothing"
MINI = FAST.partition("/")[0]  # the model that the fast adapter is for
STRENGTH = "little keeps the picture, 1 draws it anew; where you paint, only that is drawn anew"
PAINT = "Give a picture by the buttons on the left, then paint over what is to be drawn anew; unpainted, all of it is."
FOR_PROGRAMS = ("mindsigma", "parameters")  # texts of a picture that are not for people
KEPT_SECONDS = 3600  # that pictures stay on the disk

CSS = """
.gradio-container {max-width: 1240px !important; margin: 0 auto !important}
#title h1 {margin: 0; font-size: 1.35rem}
#title p {margin: 0; opacity: .75; font-size: .9rem}
#progress .track {height: 8px; border-radius: 4px; background: #8883; overflow: hidden; margin-top: 4px}
#progress .track div {height: 100%; background: var(--color-accent)}
#progress .error {color: #b91c1c}
#gallery .grid-wrap {max-height: none}
#gallery .caption-label {max-width: 100%; font-size: .7rem}
#told table {width: 100%; table-layout: fixed; font-size: .8rem; border-collapse: collapse}
#told th, #told td {border: 0 !important; border-top: 1px solid #8883 !important; padding: .2rem .4rem !important}
#told th {width: 9.5em; text-align: left; vertical-align: top; font-weight: 600}
#told td {white-space: pre-wrap; overflow-wrap: anywhere}
#facts {font-size: .8rem; opacity: .75}
.gradio-container {--block-info-text-color: #71717a; --input-placeholder-color: #71717a}
.dark .gradio-container, .gradio-container.dark {--block-info-text-color: #a1a1aa; --input-placeholder-color: #a1a1aa}
footer {display: none !important}
#main {display: grid !important; grid-template-columns: minmax(0, 1fr); align-items: start}
@media (min-width: 800px) {
  #main {grid-template: "form result" auto "options result" 1fr / minmax(0, 5fr) minmax(0, 6fr)}
  #form {grid-area: form}
  #result {grid-area: result}
  #options {grid-area: options}
}
"""


def serve(args):
    """Open the first model and start the page; returns a Served."""
    from mindsigma.commands.generate import open_pipeline
    from mindsigma.commands.web import labels_of
    from mindsigma.weights.own_sampling import own_sampling

    models, adapters = labels_of(args.model or ["sigma-mini"]), labels_of(args.lora)
    if MINI in models.values():
        adapters[FAST] = FAST
    limits = Limits(args.upload << 20, args.pixels, args.steps, args.pictures, args.waiting)

    def open_model(label):
        return open_pipeline(args, model=models[label], lora=())

    controls = labels_of(args.controlnet)
    samplers = {label: own_sampling(path) for label, path in models.items()}
    studio = Studio(open_model, models, adapters, limits, args.preview_every, controls, samplers)
    studio.open_first()
    return Served(studio, args.host, args.port)


class Served:
    """A page that is being served.

    Args:
        studio: Studio. host, port: where; port 0 takes a free one.

    Attributes:
        address: for a browser.
    """

    def __init__(self, studio, host="127.0.0.1", port=0):
        # What gradio keeps of uploads and pictures lies in a folder of this process alone.
        self.folder = Path(tempfile.mkdtemp(prefix="mindsigma-web-"))
        os.environ.update(GRADIO_TEMP_DIR=str(self.folder / "cache"), GRADIO_ANALYTICS_ENABLED="False")
        import gradio as gr
        from PIL import Image

        self.studio, self._ended = studio, threading.Event()
        self._most_pixels, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max(1, studio.limits.pixels // 2)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow refuses what has twice as many
        self.blocks = Page(studio, self.folder).blocks()
        font = ["system-ui", "sans-serif"]  # none is fetched
        try:
            _, self.address, _ = self.blocks.launch(
                server_name=host,
                server_port=port or None,
                share=False,
                prevent_thread_lock=True,
                quiet=True,
                show_error=True,
                max_file_size=studio.limits.bytes,
                theme=gr.themes.Default(font=font, font_mono=["ui-monospace", "monospace"]),
                css=CSS,
            )
        except OSError as error:
            self.close()
            raise MindSigmaError(f"--host {host} --port {port}: cannot be listened on ({one_line(error)})") from None

    def wait(self, asked=lambda: False):
        """Until somebody closes it, or `asked`, a function, says that it is to end."""
        try:
            while not (asked() or self._ended.wait(1.0)):  # in pieces, so that Ctrl-C comes through
                pass
        finally:
            self.close()

    def close(self):
        """End the page and remove what it kept."""
        from PIL import Image

        self._ended.set()
        self.studio.close()
        self.blocks.close(verbose=False)
        Image.MAX_IMAGE_PIXELS = self._most_pixels
        shutil.rmtree(self.folder, ignore_errors=True)


class Page:
    """Builds the page and answers it.

    Args:
        studio: Studio. folder: Path for pictures, of this process alone.
    """

    def __init__(self, studio, folder):
        self.studio, self.folder = studio, folder
        self.adapters = [label for label in studio.adapters if label != FAST]  # FAST has a place of its own
        (folder / "pictures").mkdir()
        self._files = {}  # user: paths of the pictures that are shown to them

    def blocks(self):
        """The gradio Blocks."""
        import gradio as gr

        studio, limits = self.studio, self.studio.limits
        with gr.Blocks(title="mindsigma", delete_cache=(KEPT_SECONDS, KEPT_SECONDS), analytics_enabled=False) as blocks:
            gr.Markdown("# mindsigma\nPixArt-Σ draws what you describe.", elem_id="title")
            with gr.Row(elem_id="main"):  # on a wide window form and options stand left of the result
                with gr.Column(elem_id="form", min_width=0):
                    prompt = gr.Textbox(label="Prompt", lines=3, placeholder="a penguin on a yellow background")
                    negative = gr.Textbox(label="Negative prompt", lines=1, placeholder="what to lead away from")
                    with gr.Row():
                        draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=100)
                        cancel = gr.Button("Cancel", elem_id="cancel", min_width=100)
                    ratio = gr.Radio(
                        list(RATIOS), value="1:1", label="Width : height", info="a picture that you give brings its own"
                    )
                    with gr.Row():
                        pictures = gr.Slider(1, limits.pictures, 1, step=1, label="Pictures")
                        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED)
                    keep = gr.Checkbox(False, label="Keep the seed", info="else a new one is taken for every drawing")
                    fast = gr.Checkbox(
                        False, label="Fast", info=f"{MINI} in 4 steps, as it was distilled", visible=self.has_fast
                    )
                with gr.Column(elem_id="result", min_width=0):
                    progress = gr.HTML(self.idle(), elem_id="progress")
                    preview = gr.Image(
                        label="Preview",
                        interactive=False,
                        visible=False,
                        height=256,
                        elem_id="preview",
                        format="jpeg",
                        buttons=["fullscreen"],
                    )
                    gallery = gr.Gallery(
                        label="Pictures",
                        columns=2,
                        object_fit="contain",
                        elem_id="gallery",
                        format="png",
                        buttons=["download", "download_all", "fullscreen"],
                    )
                    with gr.Accordion("How the chosen picture was drawn", open=False):
                        told = gr.HTML(self.table({}), elem_id="told")
                    again = gr.UploadButton(
                        "Draw again from a PNG of this project", file_types=[".png"], type="binary", elem_id="again"
                    )
                    facts = gr.HTML("", elem_id="facts")  # filled in once the page answers
                with gr.Column(elem_id="options", min_width=0):
                    with gr.Accordion("Sampling", open=False):
                        own = studio.sampler_of(studio.models[0])
                        own_steps, own_guidance = studio.usual(own, studio.models[0])
                        sampler = gr.Dropdown(list(SAMPLERS), value=own, label="Sampler")
                        steps = gr.Slider(1, limits.steps, own_steps, step=1, label="Steps")
                        guidance = gr.Slider(1, 15, own_guidance, step=0.1, label="Guidance", info="1 is none")
                        pag = gr.Slider(
                            0, 10, 0, step=0.1, label="Perturbed attention", info="0 is none; more costs a third more"
                        )
                    with gr.Accordion("Model and adapters", open=False):
                        model = gr.Dropdown(studio.models, value=studio.models[0], label="Model")
                        adapters = []
                        for label in self.adapters:
                            chosen = gr.Checkbox(False, label=label)
                            weight = gr.Slider(-2, 2, 1, step=0.05, label="Weight")
                            adapters += [chosen, weight]
                        if not self.adapters:
                            gr.Markdown("This page was started without adapters (`--lora FILE`).")
                    with gr.Accordion("Draw from a picture", open=False):
                        given = gr.ImageEditor(
                            label="Picture",
                            type="pil",
                            image_mode="RGBA",
                            sources=["upload", "clipboard"],
                            layers=False,
                            transforms=(),
                            brush=gr.Brush(default_size=24, colors=["#ffffff"], color_mode="fixed"),
                            height=360,
                            placeholder=PAINT,
                            elem_id="given",
                        )
                        strength = gr.Slider(0.05, 1, 0.6, step=0.05, label="Strength", info=STRENGTH)
                    with gr.Accordion("Control by a picture", open=False, visible=bool(studio.controls)):
                        control = gr.Dropdown([NO_CONTROL, *studio.controls], value=NO_CONTROL, label="ControlNet")
                        control_scale = gr.Slider(0, 2, 1, step=0.05, label="Weight", info="0 is none")
                        condition = gr.Dropdown(
                            [AS_IT_IS, *CONDITIONS],
                            value=AS_IT_IS,
                            label="Make of the picture first",
                            info="nothing, if the ControlNet takes it as it is; of a photo what it was trained on",
                        )
                        control_image = gr.Image(
                            label="Its picture",
                            type="pil",
                            image_mode="RGB",
                            sources=["upload", "clipboard"],
                            height=256,
                            elem_id="control_image",
                        )
            memory = gr.State([])
            values = [prompt, negative, ratio, pictures, seed, keep, sampler, steps, guidance, pag, model, fast]
            values += [given, strength, control, control_image, control_scale, condition, *adapters]
            shown = [progress, preview, gallery, memory, seed, facts]
            private = {"api_visibility": "private", "show_progress": "hidden"}

            def drawing(request: gr.Request, *given):
                yield from self.draw(request.session_hash, *given)

            def cancelling(request: gr.Request):
                self.studio.cancel(request.session_hash)

            def leaving(request: gr.Request):
                self.leave(request.session_hash)

            def chosen_picture(memory, chosen: gr.SelectData):
                return self.table(memory[chosen.index] if 0 <= chosen.index < len(memory) else {})

            gr.on(
                [draw.click, prompt.submit], drawing, values, shown, concurrency_limit=None, trigger_mode="multiple",
                **private,
            )  # fmt: skip
            cancel.click(cancelling, None, None, queue=False, **private)
            gallery.select(chosen_picture, memory, told, **private)
            fields = [prompt, negative, ratio, seed, keep, sampler, steps, guidance, pag, model, fast, strength]
            again.upload(self.fill, again, [*fields, progress, *adapters], **private)
            # Of the user's own choices only: a picture that fills in the form tells its steps and guidance itself.
            gr.on([model.input, fast.input], self.own, [model, fast], [fast, sampler, steps, guidance], **private)
            sampler.input(studio.usual, sampler, [steps, guidance], **private)
            blocks.load(self.facts, None, facts, **private)
            blocks.unload(leaving)
        blocks.queue(default_concurrency_limit=None, max_size=None)
        return blocks

    @staticmethod
    def idle(text="Ready."):
        """The line about progress where there is none."""
        return f"<div>{html.escape(text)}</div>"

    @staticmethod
    def share(text, share):
        """The line about progress with a bar of this share."""
        return f'<div>{html.escape(text)}</div><div class="track"><div style="width: {share:.0%}"></div></div>'

    @staticmethod
    def table(told):
        """What a picture tells, dict name -> text, for people."""
        rows = "".join(
            f"<tr><th>{html.escape(name.replace('_', ' '))}</th><td>{html.escape(str(text))}</td></tr>"
            for name, text in told.items()
            if text not in ("", None)
        )
        return f"<table>{rows}</table>" if rows else "<div>Choose a picture above.</div>"

    def facts(self):
        """What the page says about itself."""
        limits, waiting = self.studio.limits, self.studio.waiting
        text = (
            f"One drawing at a time, {waiting} waiting, at most {limits.waiting} may. "
            f"This process holds {self.studio.memory()}. Uploads: at most {limits.bytes >> 20} MB. "
            f"Pictures are kept for {KEPT_SECONDS // 60} minutes: save what you like; the PNG tells how it was drawn."
        )
        return html.escape(text)

    @property
    def has_fast(self):
        """Whether there is something to choose with Fast."""
        return FAST in self.studio.adapters

    def own(self, model, fast=False):
        """Whether Fast is for a model, given by its label, and the sampler, steps and guidance that go with both."""
        fast = bool(fast) and model == MINI
        sampler = "lcm" if fast else self.studio.sampler_of(model)
        return (fast, sampler, *self.studio.usual(sampler, model))

    def order(
        self, prompt, negative, ratio, pictures, seed, sampler, steps, guidance, pag, model, fast, given, strength,
        control, control_image, control_scale, condition, *adapters,
    ):  # fmt: skip
        """The Order of what stands on the page. Raises MindSigmaError."""
        if ratio not in RATIOS:
            raise MindSigmaError(f"size: '{one_line(ratio)}' is none of this page's")
        image, mask = self.given(given)
        options = {
            "sampler": sampler, "num_inference_steps": steps, "guidance_scale": guidance, "pag_scale": pag,
            **({} if image is None else {"strength": strength}),
            **({} if control == NO_CONTROL else {"control_scale": control_scale}),
        }  # fmt: skip
        if fast and (model, sampler) != (MINI, "lcm"):
            raise MindSigmaError(
                f"Fast is for {MINI} with sampler lcm, not for {one_line(model)} with {one_line(sampler)}"
            )
        pairs = zip(self.adapters, adapters[::2], adapters[1::2])
        chosen = ((FAST, 1.0),) * bool(fast) + tuple((label, weight) for label, on, weight in pairs if on)
        control, control_image = ("", None) if control == NO_CONTROL else (control, control_image)
        ratio = None if image or control_image else RATIOS[ratio]
        return Order(
            prompt, negative, options, seed, pictures, model, chosen, image, mask, ratio, control, control_image,
            "" if condition == AS_IT_IS else condition,
        )  # fmt: skip

    def given(self, value):
        """(picture, mask) of what the editor holds: PIL images or None."""
        from PIL import Image, ImageChops

        background = value.get("background") if isinstance(value, dict) else None
        if background is None:
            return None, None
        self.studio.limits.picture(background)
        mask = Image.new("L", background.size)
        for layer in value.get("layers") or ():
            if layer is not None and layer.size == background.size:
                mask = ImageChops.lighter(mask, layer.convert("RGBA").getchannel("A"))
        mask = mask.point(lambda alpha: 255 if alpha >= 128 else 0)
        return background, mask if mask.getextrema()[1] else None

    def draw(self, user, prompt, negative, ratio, pictures, seed, keep, *others):
        """Draw and show; yields what `shown` takes. `others`: of `order`, after the seed."""
        import gradio as gr

        seed = seed if keep else secrets.randbelow(LARGEST_SEED + 1)
        same, hidden = gr.skip(), gr.update(visible=False, value=None)
        try:
            order = self.order(prompt, negative, ratio, pictures, seed, *others)
            ticket = self.studio.submit(order, user)
        except MindSigmaError as error:
            yield self.wrong(str(error)), same, same, same, same, self.facts()
            return
        self._forget(user)
        paths, told = [], []
        yield self.idle("Waiting."), hidden, [], [], seed, self.facts()
        for event in ticket.events():
            if isinstance(event, Waiting):
                text = f"Waiting: {event.before} before this one." if event.before else "Waiting."
                yield self.idle(text), same, same, same, same, self.facts()
            elif isinstance(event, Loading):
                yield self.idle("Reading the model's weights."), same, same, same, same, same
            elif isinstance(event, Step):
                text = f"Step {event.step} of {event.steps}" + (
                    f", picture {event.picture} of {event.pictures}" if event.pictures > 1 else ""
                )
                share = (event.picture - 1 + event.step / event.steps) / event.pictures
                shown = same if event.preview is None else gr.update(visible=True, value=event.preview)
                yield self.share(text, share), shown, same, same, same, same
            elif isinstance(event, Picture):
                paths.append((self._keep(user, event.png), f"seed {event.seed}"))
                told.append({name: text for name, text in event.told.items() if name not in FOR_PROGRAMS})
                yield same, same, list(paths), list(told), same, same
            elif isinstance(event, Ended):
                done = f"Done: {len(paths)} picture{'s' * (len(paths) != 1)}. {' '.join(event.notes)}"
                text = self.idle("Cancelled." if event.cancelled else done.strip())
                yield self.wrong(event.error) if event.error else text, hidden, same, same, same, self.facts()

    @staticmethod
    def wrong(text):
        """The line about progress where something is wrong."""
        return f'<div class="error" role="alert">{html.escape(text)}</div>'

    def _keep(self, user, png):
        """Path of a picture's file, whose name nobody chose."""
        path = self.folder / "pictures" / f"{secrets.token_hex(16)}.png"
        path.write_bytes(png)
        self._files.setdefault(user, []).append(path)
        return str(path)

    def _forget(self, user):
        """Remove the files of a user's earlier pictures; gradio's copies go after their time."""
        for path in self._files.pop(user, ()):
            path.unlink(missing_ok=True)

    def leave(self, user):
        """A user closed the page: nothing more is drawn for them."""
        self.studio.cancel(user)
        self._forget(user)

    def fill(self, data):
        """Values of the fields, and of the adapters, by what an uploaded picture tells of its making."""
        import gradio as gr

        from mindsigma.pipeline.metadata import read

        fields = 13 + 2 * len(self.adapters)
        try:
            options, _ = read(self.studio.limits.upload(data))
            return self.filled(options)
        except MindSigmaError as error:
            return [gr.skip()] * 12 + [self.wrong(str(error))] + [gr.skip()] * (fields - 13)

    def filled(self, options):
        """Values of the fields for the options that a picture tells; what the page does not have is said."""
        notes = []

        def number(name, default, low, high):
            value = options.get(name, default)
            fits = isinstance(value, (int, float)) and not isinstance(value, bool)
            return min(max(value, low), high) if fits else default

        def text(name):
            value = options.get(name, "")
            value = value[0] if isinstance(value, list) and value else value
            return self.studio.limits.text(name, value) if isinstance(value, str) else ""

        height, width = number("height", 1, 1, 1e5), number("width", 1, 1, 1e5)
        ratio = min(RATIOS, key=lambda name: abs(RATIOS[name] - height / width))
        model, sampler = options.get("model"), options.get("sampler")
        if model not in self.studio.models:
            notes.append(f"the model {one_line(model, 60)} is none of this page's")
            model = self.studio.models[0]
        if not isinstance(sampler, str) or sampler not in SAMPLERS:
            sampler = self.studio.sampler_of(model)
        own_steps, own_guidance = self.studio.usual(sampler, model)
        weights, lora = {}, options.get("lora")
        for entry in lora if isinstance(lora, list) else ():
            label, colon, weight = str(entry).rpartition(":")
            weights[label if colon else weight] = weight if colon else 1
        unknown = weights.keys() - self.studio.adapters.keys()
        notes += [f"the adapter {one_line(label, 60)} is none of this page's" for label in sorted(unknown)]
        if options.get("image"):
            notes.append("it was drawn from a picture, which has to be given again")
        if options.get("control_image"):
            notes.append("a ControlNet took a picture, which has to be given again")
        adapters = []
        for label in self.adapters:
            try:
                adapters += [label in weights, min(max(float(weights.get(label, 1)), -2), 2)]
            except ValueError:
                adapters += [False, 1]
        line = self.idle("Filled in from the picture" + (f"; {'; '.join(notes)}." if notes else "."))
        return [
            text("prompt"), text("negative_prompt"), ratio, number("seed", 0, 0, LARGEST_SEED), True, sampler,
            number("steps", own_steps, 1, self.studio.limits.steps), number("guidance_scale", own_guidance, 1, 15),
            number("pag_scale", 0, 0, 10), model, FAST in weights and self.has_fast, number("strength", 0.6, 0.05, 1),
            line, *adapters,
        ]  # fmt: skip
