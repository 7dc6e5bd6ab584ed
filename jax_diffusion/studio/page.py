"""The page: two panels of fields, what they draw, and a mask to paint."""

import html
import pathlib
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from jax_diffusion.errors import UserError
from jax_diffusion.solvers.grids import SPACINGS
from jax_diffusion.studio import server, stage
from jax_diffusion.studio import settings as said
from jax_diffusion.studio.drawing import Studio

HERE = pathlib.Path(__file__).parent
NAMES = ("solver", "steps", *said.FIELDS, "grid", "more", "guidance", "labels", "seed", "num")
LABELS = {
    "eta": "eta (0: no noise)",
    "S_churn": "S_churn (0: no noise)",
    "jump_length": "jump length",
    "resamples": "resamples",
}
HELD_OUT, LAST = "held-out image", "last sample"
AT_A_TIME = 4  # drawings; they take turns on the device
LARGEST = "20mb"  # of an uploaded file


def application(studio: Studio) -> Callable:
    """The ASGI application of the page."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return server.application(
        blocks(studio),
        theme=gr.themes.Default(**fonts),
        css=(HERE / "page.css").read_text(),
        footer_links=[],
        max_file_size=LARGEST,
    )


def blocks(studio: Studio) -> gr.Blocks:
    model = studio.model
    height, width, channels = model.shape
    with gr.Blocks(title=f"{studio.name} · studio", analytics_enabled=False) as page:
        last = gr.State(None)  # of this browser: {"images": uint8 [N, H, W, C], "labels": [...] or None}
        image = gr.State(None)  # to fill in, uint8 [H, W, C]
        with gr.Row():
            kind = "colour" if channels == 3 else "grey"
            about = f"{width}x{height}, {kind}, {len(model.class_names) or 'no'} classes, step {model.step:,}"
            gr.HTML(f"<h2>{html.escape(studio.name)}</h2><p>{about}</p>")
            load = gr.UploadButton(
                "Load settings from a PNG", type="binary", size="sm", scale=0, min_width=230, elem_id="load"
            )
        message = gr.HTML(elem_id="message")
        with gr.Tabs() as tabs:
            with gr.Tab("Sample", id="sample", elem_id="tab-sample"), gr.Row():
                with gr.Column(scale=2, min_width=300):
                    sampling = _fields(model, said.of_recipe(model), "sample")
                    sample_button, sample_stop = _buttons("Sample", "sample")
                with gr.Column(scale=3, min_width=320):
                    sample_out = gr.HTML(elem_id="sample-progress"), gr.HTML(elem_id="sample-picture")
            with gr.Tab("Fill in", id="inpaint", elem_id="tab-inpaint"), gr.Row():
                with gr.Column(scale=2, min_width=300):
                    inpainting = _fields(model, said.of_inpainting(model), "inpaint")
                    inpaint_button, inpaint_stop = _buttons("Fill in", "inpaint")
                with gr.Column(scale=3, min_width=320):
                    with gr.Row():
                        source = gr.Radio([HELD_OUT, LAST], value=HELD_OUT, label="image", elem_id="source")
                        index = gr.Number(0, label="number, from 0", min_width=100, elem_id="index")
                    upload = gr.UploadButton("or upload one", type="binary", size="sm", elem_id="upload")
                    mask = gr.HTML(
                        {},
                        html_template=(HERE / "canvas.html").read_text(),
                        js_on_load=(HERE / "canvas.js").read_text(),
                        elem_id="canvas",
                    )
                with gr.Column(scale=3, min_width=320):
                    inpaint_out = gr.HTML(elem_id="inpaint-progress"), gr.HTML(elem_id="inpaint-picture")

        def sample(*values):
            settings = said.read(model, dict(zip(NAMES, values, strict=True)))
            for shot in studio.sample(settings):
                kept = {"images": shot.images, "labels": settings.labels} if shot.file else gr.skip()
                yield *_shown(studio, "sample", settings, shot), kept

        def inpaint(known, drawn, *values):
            settings = said.read(model, dict(zip(NAMES, values, strict=True)))
            for shot in studio.inpaint(settings, known, stage.painted(drawn, model.shape)):
                yield _shown(studio, "inpaint", settings, shot)

        def choose(where, number, samples):
            number = said.whole("number of the image", number, 0, said.MOST_SEED)
            known, label = studio.held_out(number) if where == HELD_OUT else _of_last(samples, number)
            labels = None if label is None else (label,)
            return known, stage.canvas(known), said.show_labels(labels, model.class_names), ""

        def uploaded(file):
            known = studio.uploaded(file)
            return known, stage.canvas(known), said.show_labels(None, model.class_names), ""

        def restored(file):
            kind, settings, known, fill, warning = studio.restored(file)
            fields = [gr.skip()] * len(NAMES)
            shown = said.show(settings, model.class_names)
            own = said.fields_of(settings.solver)
            new = [_update(name, shown[name], own) for name in NAMES]
            text = stage.note(warning or f"The settings are back: press {'Sample' if kind == 'sample' else 'Fill in'}.")
            if kind == "sample":
                return text, gr.Tabs(selected=kind), *new, *fields, gr.skip(), gr.skip()
            return text, gr.Tabs(selected=kind), *fields, *new, known, stage.canvas(known, fill)

        chosen = [image, mask, inpainting["labels"], message]
        drawing = {"concurrency_limit": AT_A_TIME, "concurrency_id": "drawing", "show_progress": "hidden"}
        quick = {"show_progress": "hidden"}
        stopped: set[tuple[str, str]] = set()
        sample_button.click(
            _frames(sample, 3, "sample", stopped),
            [*sampling.values()],
            [*sample_out, last],
            api_name="sample",
            **drawing,
        )
        inpaint_button.click(
            _frames(inpaint, 2, "inpaint", stopped),
            [image, mask, *inpainting.values()],
            [*inpaint_out],
            api_name="inpaint",
            **drawing,
        )
        for button, kind in ((sample_stop, "sample"), (inpaint_stop, "inpaint")):
            button.click(_stop(kind, stopped), queue=False, api_visibility="private", **quick)
        for fields in (sampling, inpainting):
            # Not `change`: that a saved picture brings its own values back must not reset them.
            fields["solver"].input(
                lambda name: [_update(f, said.fields_of(name).get(f), said.fields_of(name)) for f in said.FIELDS],
                fields["solver"],
                [fields[f] for f in said.FIELDS],
                api_visibility="private",
                **quick,
            )
        given, options = [source, index, last], {"api_visibility": "private", **quick}
        gr.on([source.input, index.input], _said(choose, 4), given, chosen, trigger_mode="always_last", **options)
        page.load(_said(choose, 4), given, chosen, **options)
        upload.upload(_said(uploaded, 4), upload, chosen, **options)
        back = [message, tabs, *sampling.values(), *inpainting.values(), image, mask]
        load.upload(_said(restored, len(back), first=True), load, back, **options)
    return page


def _fields(model: Any, settings: said.Settings, panel: str) -> dict[str, Any]:
    """The fields of a panel by NAMES, holding `settings`."""
    shown, own = said.show(settings, model.class_names), said.fields_of(settings.solver)
    names, fields = model.class_names, {}

    def at(name):
        return {"elem_id": f"{panel}-{name}", "value": shown[name]}

    with gr.Row():
        fields["solver"] = gr.Dropdown(said.known_solvers(), label="solver", **at("solver"))
        fields["steps"] = gr.Number(label="steps", **at("steps"))
    with gr.Row():
        for name in said.FIELDS:
            fields[name] = gr.Number(label=LABELS[name], visible=name in own, min_width=140, **at(name))
    with gr.Row(visible=bool(names)):
        fields["labels"] = gr.Dropdown(
            [*names, said.UNCONDITIONAL], label="labels, in turn (empty: all)", multiselect=True,
            allow_custom_value=True, scale=2, **at("labels"),
        )  # fmt: skip
        fields["guidance"] = gr.Number(label="guidance (1: none)", min_width=120, **at("guidance"))
    with gr.Row():
        fields["seed"] = gr.Number(label="seed", min_width=120, **at("seed"))
        fields["num"] = gr.Number(label="number of images", min_width=120, **at("num"))
    with gr.Accordion("More", open=bool(shown["more"] or shown["grid"])), gr.Row():
        fields["grid"] = gr.Dropdown(
            [("by schedule", ""), *SPACINGS], label="grid of times", allow_custom_value=True, **at("grid")
        )
        fields["more"] = gr.Textbox(label="other options, OPTION=VALUE ...", **at("more"))
    return {name: fields[name] for name in NAMES}


def _buttons(text: str, panel: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        go = gr.Button(text, variant="primary", scale=3, elem_id=f"{panel}-go")
        return go, gr.Button("Stop", scale=1, min_width=80, elem_id=f"{panel}-stop")


def _update(name: str, value: Any, own: dict[str, Any]) -> Any:
    """A field's new value; those that the solver does not have are hidden."""
    if name in said.FIELDS:
        return gr.update(value=value, visible=True) if name in own else gr.update(visible=False)
    return gr.update(value=value)


def _shown(studio: Studio, kind: str, settings: said.Settings, shot: Any) -> tuple[str, Any]:
    """(progress, picture) of a shot."""
    if shot.picture is None:
        return stage.progress(shot), gr.skip()
    name = f"{studio.name}-{kind}-{settings.solver}-{settings.steps}-seed{settings.seed}"
    command = studio.command(settings) if kind == "sample" else ""
    return stage.progress(shot), stage.picture(shot.picture, shot, name, command)


def _of_last(samples: dict | None, number: int) -> tuple[Any, int | None]:
    """Image `number` of the samples drawn last and its label, as Studio.held_out gives them."""
    if samples is None:
        raise UserError("there is no last sample yet: press Sample on the other side first")
    images, labels = samples["images"], samples["labels"]
    if number >= len(images):
        raise UserError(f"number {number}: the last samples are 0 to {len(images) - 1}")
    return images[number], labels and labels[number % len(labels)]


def _complaint(e: Exception) -> str:
    """What went wrong, for the page; what is no mistake of the user's goes to the terminal too."""
    if isinstance(e, UserError | OSError):
        return stage.complaint(str(e))
    traceback.print_exc()
    return stage.complaint(f"A fault of this program ({type(e).__name__}: {e}); the terminal says more.")


def _stop(kind: str, stopped: set[tuple[str, str]]) -> Callable:
    """Ends the drawing of a browser. Gradio's own way lets a last frame through after it, and loses the next click."""

    def stop(request: gr.Request) -> None:
        stopped.add((request.session_hash or "", kind))

    return stop


def _frames(function: Callable[..., Iterator], outputs: int, kind: str, stopped: set[tuple[str, str]]) -> Callable:
    """A generator of `outputs` values each, the first of which says what went wrong.

    stopped: the browsers, and which drawing of theirs, that are to stop.
    """

    def drawing(request: gr.Request, *inputs):
        mine = (request.session_hash or "", kind)
        stopped.discard(mine)
        try:
            for values in function(*inputs):
                if mine in stopped:
                    yield stage.note("Stopped."), *[gr.skip()] * (outputs - 1)
                    return
                yield values
        except Exception as e:
            yield _complaint(e), *[gr.skip()] * (outputs - 1)

    return drawing


def _said(function: Callable[..., tuple], outputs: int, first: bool = False) -> Callable:
    """A function of so many results, one of which, the last or the first, says what went wrong."""

    def call(*inputs):
        try:
            return function(*inputs)
        except Exception as e:
            rest = [gr.skip()] * (outputs - 1)
            return (_complaint(e), *rest) if first else (*rest, _complaint(e))

    return call
