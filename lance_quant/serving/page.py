"""The web page (Gradio): chat about pictures and clips, draw, edit, clips, a gallery, and two models side by side.

The page asks the same Engine as the API does, so it waits in the same line. Every handler is a generator that says how
far it is; Gradio closes it when the user presses Stop or leaves, and that ends the request.
"""

import queue
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from PIL import Image

from lance_quant.errors import InputError
from lance_quant.evaluation.metrics import psnr
from lance_quant.inference.pipeline import Clip, OnStep, Pipeline, Progress, Stopped
from lance_quant.lance.settings import MAX_NEW_TOKENS, SEED, Sampling
from lance_quant.serving.engine import Job, TookTooLong
from lance_quant.serving.loading import Loaded
from lance_quant.serving.service import ApiError, Service
from lance_quant.storage.atomic import size_text

T = TypeVar("T")
_DRAWN = Sampling()
_KEPT = 24  # pictures in a visitor's gallery
_SIDES = (256, 512, 768, 1024)
_BUTTONS = ["download", "fullscreen"]
_CSS = """
@media (min-width: 1000px) {.gradio-container {max-width: 960px !important; margin: 0 auto !important}}
.progress {font-variant-numeric: tabular-nums; min-height: 1.6em}
.progress progress {width: 100%; accent-color: var(--primary-500)}
@media (max-width: 480px) {.gradio-container {padding: 8px !important} .side-by-side {flex-direction: column}}
"""


def style() -> dict[str, Any]:
    """How the page looks, for mount_gradio_app: the system's fonts, since nothing is fetched from elsewhere."""
    fonts = ["system-ui", "sans-serif"]
    return {"theme": gr.themes.Soft(font=fonts, font_mono=["ui-monospace", "monospace"]), "css": _CSS,
            "footer_links": ["settings"]}


def build(service: Service, loaded: Loaded) -> gr.Blocks:
    """The page for these models."""
    with gr.Blocks(title="Lance", analytics_enabled=False) as page:
        names = list(loaded.pipelines)
        gr.Markdown("# Lance\nPictures, clips and questions about them, on this machine.")
        model = gr.Dropdown(names, value=names[0], label="Model", interactive=len(names) > 1, elem_id="model")
        kept = gr.State([])
        with gr.Tab("Draw"):
            _draw_tab(service, model, kept)
        with gr.Tab("Ask"):
            _ask_tab(service, model)
        with gr.Tab("Edit"):
            _edit_tab(service, model, kept)
        with gr.Tab("Clip"):
            _clip_tab(service, model)
        with gr.Tab("Compare"):
            _compare_tab(service, loaded)
        with gr.Tab("Gallery") as gallery_tab:
            gallery = gr.Gallery(label="What you made since you opened this page", columns=3, elem_id="gallery")
            gallery_tab.select(lambda shown: shown, kept, gallery, show_progress="hidden")
    return page


# Running

def follow(service: Service, model: str, work: Callable[[Pipeline, OnStep], T]) -> Iterator[Progress | str | T]:
    """Run work in the engine: how long the line is or how far it is, and at last the result.

    The job is ended when the iterator is closed. Raises gr.Error with one line for what a user can mend.
    """
    steps: queue.Queue[Progress] = queue.Queue()
    try:
        job: Job[T] = service.submit(model, work, steps.put)
    except ApiError as error:
        raise gr.Error(str(error), print_exception=False) from None
    try:
        while not job.future.done():
            try:
                yield steps.get(timeout=0.1)
            except queue.Empty:
                if job.started is None:
                    yield f"in line, {service.engine.waiting} waiting"
        yield job.future.result()
    except (InputError, TookTooLong, Stopped) as error:
        raise gr.Error(str(error), print_exception=False) from None
    finally:
        service.engine.cancel(job)  # of no effect on one that is done


def bar(state: Progress | str) -> str:
    """A line of HTML: how far a request is."""
    if isinstance(state, str):
        return f"<div class='progress'>{state}</div>"
    what = f"{state.unit} {state.done} of {state.total}"
    return f"<div class='progress'>{what}<progress value='{state.done}' max='{state.total}'></progress></div>"


def _kept(shown: list[Any], image: Image.Image, caption: str) -> list[Any]:
    return [(image, caption), *shown][:_KEPT]


def _size(service: Service, model: str, side: int) -> dict[str, Any]:
    return dict(service.sizes.get(model, {})) or {"height": int(side), "width": int(side)}


def _sampling(steps: int, guidance: float) -> dict[str, Any]:
    return {"num_timesteps": int(steps), "cfg_scale": float(guidance)}


def _controls() -> tuple[gr.Number, gr.Slider, gr.Slider]:
    with gr.Accordion("Settings", open=False):
        seed = gr.Number(SEED, label="Seed", precision=0, minimum=0)
        steps = gr.Slider(1, 100, _DRAWN.num_timesteps, step=1, label="Steps")
        guidance = gr.Slider(1, 10, _DRAWN.cfg_scale, step=0.1, label="Guidance (1: none)")
    return seed, steps, guidance


def _side(service: Service, value: int) -> gr.Dropdown:
    """The size of what is made of a prompt alone; hidden where all models have one size of their own."""
    free = len(service.sizes) < len(service.engine.models)
    return gr.Dropdown(_SIDES, value=value, label="Side in pixels", visible=free)


def _buttons(name: str, key: str) -> tuple[gr.Button, gr.Button, gr.HTML]:
    with gr.Row():
        go = gr.Button(name, variant="primary", elem_id=f"{key}-go")
        stop = gr.Button("Stop", elem_id=f"{key}-stop")
    return go, stop, gr.HTML(elem_id=f"{key}-progress")


# Tabs

def _draw_tab(service: Service, model: gr.Dropdown, kept: gr.State) -> None:
    prompt = gr.Textbox(label="What is to be seen", lines=2, elem_id="draw-prompt")
    side = _side(service, 768)
    seed, steps, guidance = _controls()
    go, stop, told = _buttons("Draw", "draw")
    image = gr.Image(label="Picture", format="png", interactive=False, buttons=_BUTTONS, elem_id="draw-picture")

    def draw(model: str, prompt: str, side: int, seed: int, steps: int, guidance: float,
             shown: list[Any]) -> Iterator[tuple[Any, Any, Any]]:
        def work(pipeline: Pipeline, on_step: OnStep) -> Image.Image:
            return pipeline.draw(prompt, seed=int(seed), on_step=on_step, **_size(service, model, side),
                                 **_sampling(steps, guidance))

        caption = f"{prompt} · seed {int(seed)} · {int(steps)} steps · guidance {guidance:g} · {model}"
        yield from _picture_and_gallery(service, model, work, int(seed), caption, shown)

    event = go.click(draw, [model, prompt, side, seed, steps, guidance, kept], [told, image, kept],
                     show_progress="hidden", concurrency_limit=None)
    stop.click(lambda: bar("stopped"), None, told, cancels=[event], show_progress="hidden")


def _picture_and_gallery(service: Service, model: str, work: Callable[[Pipeline, OnStep], Image.Image], seed: int,
                         caption: str, shown: list[Any]) -> Iterator[tuple[Any, Any, Any]]:
    """States of the bar, the picture and the gallery while `work` runs; the picture joins the gallery at its end."""
    started = time.monotonic()
    for state in follow(service, model, work):
        if isinstance(state, Image.Image):
            yield bar(f"{time.monotonic() - started:.1f} s, seed {seed}"), state, _kept(shown, state, caption)
        else:
            yield bar(state), gr.skip(), gr.skip()


def _ask_tab(service: Service, model: gr.Dropdown) -> None:
    with gr.Row(elem_classes="side-by-side"):
        image = gr.Image(label="Picture", type="pil", elem_id="ask-picture")
        video = gr.Video(label="or clip", elem_id="ask-clip")
    chat = gr.Chatbot(label="Answers; each question is answered on its own", height=260, elem_id="ask-chat")
    question = gr.Textbox(label="Question", elem_id="ask-question")
    length = gr.Slider(1, service.limits.tokens, min(MAX_NEW_TOKENS, service.limits.tokens), step=1,
                       label="Longest answer, in tokens")
    go, stop, told = _buttons("Ask", "ask")

    def ask(model: str, image: Image.Image | None, video: str | None, question: str, length: int,
            talk: list[Any]) -> Iterator[tuple[Any, Any]]:
        if image is None and video is None:
            raise gr.Error("Show a picture or a clip first.", print_exception=False)
        pieces: list[str] = []
        options: dict[str, Any] = {"max_new_tokens": int(length), "resolution": service.preset(model, ""),
                                   "on_text": pieces.append}

        def work(pipeline: Pipeline, on_step: OnStep) -> str:
            if image is not None:
                return pipeline.ask(image, question, on_step=on_step, **options)
            return pipeline.ask_video(str(video), question, on_step=on_step, **options)

        asked = [*talk, {"role": "user", "content": question}]
        for state in follow(service, model, work):
            answer = state if isinstance(state, str) and pieces and not state.startswith("in line") else "".join(pieces)
            yield bar(state if isinstance(state, Progress) else ""), [*asked, {"role": "assistant", "content": answer}]

    event = go.click(ask, [model, image, video, question, length, chat], [told, chat], show_progress="hidden",
                     concurrency_limit=None)
    stop.click(lambda: bar("stopped"), None, told, cancels=[event], show_progress="hidden")


def _edit_tab(service: Service, model: gr.Dropdown, kept: gr.State) -> None:
    with gr.Row(elem_classes="side-by-side"):
        source = gr.Image(label="Picture", type="pil", elem_id="edit-source")
        made = gr.Image(label="Edited", format="png", interactive=False, buttons=_BUTTONS, elem_id="edit-picture")
    instruction = gr.Textbox(label="What is to change", elem_id="edit-instruction")
    seed, steps, guidance = _controls()
    go, stop, told = _buttons("Edit", "edit")

    def edit(model: str, source: Image.Image | None, instruction: str, seed: int, steps: int, guidance: float,
             shown: list[Any]) -> Iterator[tuple[Any, Any, Any]]:
        if source is None:
            raise gr.Error("Choose a picture first.", print_exception=False)

        def work(pipeline: Pipeline, on_step: OnStep) -> Image.Image:
            return pipeline.edit(source, instruction, resolution=service.preset(model, ""), seed=int(seed),
                                 on_step=on_step, **_sampling(steps, guidance))

        caption = f"{instruction} · seed {int(seed)} · {int(steps)} steps · guidance {guidance:g} · {model}"
        yield from _picture_and_gallery(service, model, work, int(seed), caption, shown)

    event = go.click(edit, [model, source, instruction, seed, steps, guidance, kept], [told, made, kept],
                     show_progress="hidden", concurrency_limit=None)
    stop.click(lambda: bar("stopped"), None, told, cancels=[event], show_progress="hidden")


def _clip_tab(service: Service, model: gr.Dropdown) -> None:
    prompt = gr.Textbox(label="What happens, or what is to change in a clip", elem_id="clip-prompt")
    with gr.Row(elem_classes="side-by-side"):
        first = gr.Image(label="First picture, if any", type="pil")
        edited = gr.Video(label="Clip to edit, if any")
    frames = gr.Slider(1, service.limits.frames, 49, step=4, label="Frames, 12 a second")
    side = _side(service, 512)
    seed, steps, guidance = _controls()
    go, stop, told = _buttons("Make a clip", "clip")
    made = gr.Video(label="Clip", interactive=False, elem_id="clip-made")

    def make(model: str, prompt: str, first: Image.Image | None, edited: str | None, frames: int, side: int, seed: int,
             steps: int, guidance: float) -> Iterator[tuple[Any, Any]]:
        options: dict[str, Any] = {"seed": int(seed), **_sampling(steps, guidance)}
        preset: dict[str, Any] = {"resolution": service.preset(model, "")}

        def work(pipeline: Pipeline, on_step: OnStep) -> Clip:
            if edited is not None:
                return pipeline.edit_video(edited, prompt, on_step=on_step, **preset, **options)
            if first is not None:
                return pipeline.animate(first, prompt, num_frames=int(frames), on_step=on_step, **preset, **options)
            return pipeline.animate(None, prompt, num_frames=int(frames), on_step=on_step,
                                    **_size(service, model, side), **options)

        for state in follow(service, model, work):
            if isinstance(state, Clip):
                with tempfile.TemporaryDirectory(prefix="lance-") as folder:
                    path = Path(folder) / f"lance_seed{int(seed)}.mp4"
                    state.save(path)
                    yield bar(f"{len(state)} frames, seed {int(seed)}"), str(path)  # Gradio copies it
            else:
                yield bar(state), gr.skip()

    event = go.click(make, [model, prompt, first, edited, frames, side, seed, steps, guidance], [told, made],
                     show_progress="hidden", concurrency_limit=None)
    stop.click(lambda: bar("stopped"), None, told, cancels=[event], show_progress="hidden")


def _compare_tab(service: Service, loaded: Loaded) -> None:
    names = list(loaded.pipelines)
    if len(names) < 2:
        gr.Markdown("One model is loaded. Start the server with several `--awq_dir` to see them side by side.")
        return
    with gr.Row():
        left = gr.Dropdown(names, value=names[0], label="Left")
        right = gr.Dropdown(names, value=names[1], label="Right")
    prompt = gr.Textbox(label="What is to be seen, or a question about the picture", elem_id="compare-prompt")
    image = gr.Image(label="Picture to ask about, if any", type="pil")
    side = _side(service, 768)
    seed, steps, guidance = _controls()
    go, stop, told = _buttons("Compare", "compare")
    with gr.Row(elem_classes="side-by-side"):
        pictures = [gr.Image(label=name, format="png", interactive=False, buttons=_BUTTONS,
                             elem_id=f"compare-{name}")
                    for name in ("left", "right")]
    with gr.Row(elem_classes="side-by-side"):
        texts = [gr.Markdown(elem_id=f"compare-{name}-text") for name in ("left", "right")]

    def compare(*given: Any) -> Iterator[tuple[Any, ...]]:
        yield from _compared(service, loaded, *given)

    event = go.click(compare, [left, right, prompt, image, side, seed, steps, guidance], [told, *pictures, *texts],
                     show_progress="hidden", concurrency_limit=None)
    stop.click(lambda: bar("stopped"), None, told, cancels=[event], show_progress="hidden")


def _compared(service: Service, loaded: Loaded, left: str, right: str, prompt: str, image: Image.Image | None,
              side: int, seed: int, steps: int, guidance: float) -> Iterator[tuple[Any, ...]]:
    """What the compare tab shows: how far, then both pictures or none, and both texts."""
    results: list[Any] = []
    seconds: list[float] = []
    for name in (left, right):
        def work(pipeline: Pipeline, on_step: OnStep, name: str = name) -> Any:
            if image is not None:
                return pipeline.ask(image, prompt, resolution=service.preset(name, ""), on_step=on_step)
            return pipeline.draw(prompt, seed=int(seed), on_step=on_step, **_size(service, name, side),
                                 **_sampling(steps, guidance))

        started = time.monotonic()
        last: Any = ""
        for last in follow(service, name, work):
            if isinstance(last, Progress):
                yield bar(last), *[gr.skip()] * 4
        results.append(last)
        seconds.append(time.monotonic() - started)
    said = [f"**{name}**, {size_text(loaded.sizes_on_disk[name])}, {took:.1f} s"
            for name, took in zip((left, right), seconds, strict=True)]
    if image is not None:
        same = "the same answer" if results[0] == results[1] else "different answers"
        yield bar(same), None, None, *[f"{line}\n\n{answer}" for line, answer in zip(said, results, strict=True)]
    else:
        difference = psnr([results[0]], [results[1]])
        same = "equal pixels" if difference == float("inf") else f"{difference:.1f} dB PSNR between them"
        yield bar(same), *results, *said
