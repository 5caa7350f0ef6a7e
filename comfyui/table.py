"""What the nodes are, as data: names, inputs, defaults, ranges, tooltips, outputs.

Everything else is made from this table: the classes that ComfyUI sees (classes.py), the English locale and the help
pages (build.py), and what the tests hold frozen. Saved workflows name nodes and inputs, and list widget values in the
order of `inputs`: add inputs at the end, and never rename anything.
"""

from dataclasses import dataclass

CATEGORY = "Lance"
SOCKETS = ("LANCE_MODEL", "IMAGE", "VIDEO", "*")  # inputs of these kinds are sockets, all others are widgets
MAX_SEED = 2**64 - 1

# Width x height of the official demo, by ratio; its 21:9 picture is wider than the model's 64 latent columns.
IMAGE_SIZES = ("21:9 1024x432", "16:9 1024x576", "3:2 944x624", "4:3 880x672", "1:1 768x768", "3:4 672x880",
               "2:3 624x944", "9:16 576x1024")
VIDEO_SIZES = ("480p 21:9 976x416", "480p 16:9 848x480", "480p 3:2 784x528", "480p 4:3 736x560", "480p 1:1 640x640",
               "480p 3:4 560x736", "480p 2:3 528x784", "480p 9:16 480x848",
               "360p 21:9 672x288", "360p 16:9 640x352", "360p 3:2 528x352", "360p 4:3 560x416", "360p 1:1 480x480",
               "360p 3:4 416x560", "360p 2:3 352x528", "360p 9:16 352x640")


@dataclass(frozen=True)
class Input:
    """One input: a socket, or a widget with its default and range.

    choices: of a COMBO; a string names a list that is made when the node is shown (classes.CHOICES).
    """

    name: str
    kind: str
    tooltip: str
    default: object = None
    low: float | None = None
    high: float | None = None
    step: float | None = None
    choices: tuple[str, ...] | str = ()
    multiline: bool = False
    advanced: bool = False
    optional: bool = False

    @property
    def is_widget(self) -> bool:
        return self.kind not in SOCKETS

    @property
    def label(self) -> str:
        return LABELS.get(self.name, self.name.replace("_", " "))


LABELS = {"cfg": "guidance (cfg)", "fps": "frames per second", "cfg_start": "guidance from t",
          "cfg_end": "guidance up to t"}


@dataclass(frozen=True)
class Output:
    """One output; a list output runs what follows once per item."""

    name: str
    kind: str
    tooltip: str
    is_list: bool = False


@dataclass(frozen=True)
class Node:
    """One node; `run` is the function in nodes.py, `help` what its help page says beside the table."""

    id: str
    title: str
    description: str
    run: str
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    help: str
    is_output: bool = False

    @property
    def widgets(self) -> list[Input]:
        return [entry for entry in self.inputs if entry.is_widget]


_MODEL = Input("model", "LANCE_MODEL", "From the Lance Model Loader.")
_RESULT = Output("image", "IMAGE", "The picture or, for a batch, all pictures.")
_LATENT = Output("latent", "LATENT", "The latents, for ComfyUI's own VAE Decode (Wan 2.2 VAE) or Save Latent.")
_CLIP = (Output("video", "VIDEO", "The clip, for Save Video."), Output("frames", "IMAGE", "Its frames as a batch."),
         _LATENT)


def _prompt(name: str, tooltip: str, default: str) -> Input:
    return Input(name, "STRING", tooltip, default, multiline=True)


def _integer(name: str, tooltip: str, default: int, low: int, high: int, step: int = 1) -> Input:
    return Input(name, "INT", tooltip, default, low, high, step)


def _number(name: str, tooltip: str, default: float, low: float, high: float, step: float,
            advanced: bool = False) -> Input:
    return Input(name, "FLOAT", tooltip, default, low, high, step, advanced=advanced)


_SAMPLING = (
    _integer("steps", "Denoising steps. 30 is the official setting; time grows in proportion.", 30, 1, 100),
    _number("cfg", "How strongly the text guides. 1 turns guidance off, which halves the time.", 4.0, 1, 20, 0.1),
    _integer("seed", "Of the noise. The same seed gives the same noise on every device.", 42, 0, MAX_SEED),
)
_ADVANCED = (
    _number("timestep_shift", "How far the schedule leans towards the noisy steps, which decide the layout.", 3.5, 0.1,
            10, 0.1, advanced=True),
    _number("cfg_start", "Guidance is off at and below this time (1 is noise, 0 the result).", 0.4, 0, 1, 0.01,
            advanced=True),
    _number("cfg_end", "Guidance is off above this time.", 1.0, 0, 1, 0.01, advanced=True),
    Input("low_memory", "BOOLEAN", "Run both passes of guidance one after the other: less memory, same result.", False,
          advanced=True),
    Input("solver", "COMBO", "euler is the official one. ab2, second-order Adams-Bashforth, is closer to the exact "
          "result at the same cost.", "euler", choices=("euler", "ab2"), advanced=True, optional=True),
    Input("reuse", "FLOAT", "How long a step's velocity may serve the next ones. 0: the official way, every step is "
          "computed. 0.1: less than half of the passes, and the picture changes a little.", 0.0, 0, 0.3, 0.01,
          advanced=True, optional=True),
    Input("cfg_renorm", "COMBO", "How a velocity that guidance made longer is scaled back: over the whole picture, "
          "cell by cell, or not at all.", "global", choices=("global", "channel", "none"), advanced=True,
          optional=True),
)
_CLIP_LENGTH = (
    _integer("frames", "Length of the clip; one more than a multiple of 4. Lance was trained at 12 a second.", 49,
             5, 121, 4),
    _integer("fps", "Frames per second that the clip is marked with; changes nothing in the frames.", 12, 1, 60),
)
_CUSTOM_SIZE = (
    _integer("width", "Only for size: custom. A multiple of 16.", 768, 64, 1024, 16),
    _integer("height", "Only for size: custom. A multiple of 16.", 768, 64, 1024, 16),
)


def _preset(kind: str) -> Input:
    values = ("auto", *(("image_768res", "image_512res", "image_256res", "image_112res") if kind == "image" else
                        ("video_480p", "video_360p", "video_192p", "image_112res")))
    return Input("resolution", "COMBO", "About how large the input is shown to the model; auto is the official preset, "
                 "and 112 for lance-nano.", "auto", choices=values, advanced=True)


_ANSWER = (
    _integer("max_new_tokens", "Longest answer, in tokens (about 0.75 English words each).", 256, 16, 2048),
    _number("temperature", "0: always the likeliest token, the official way. Above: drawn.", 0.0, 0, 2, 0.05),
    _number("top_p", "Draw only among the likeliest tokens that together reach this share.", 1.0, 0.01, 1, 0.01,
            advanced=True),
    _integer("seed", "Of the draws; of no effect at temperature 0.", 42, 0, MAX_SEED),
)
_WATCHED = _integer("max_frames", "Most frames that the model looks at. It takes 12 a second, spread evenly over "
                    "clips of more than 6 seconds.", 69, 5, 121, 4)
_SOURCE = (
    Input("video", "VIDEO", "The clip; connect this or frames.", optional=True),
    Input("frames", "IMAGE", "The clip as a batch of frames; connect this or video.", optional=True),
)
_SOURCE_FPS = _number("source_fps", "Frames per second of a clip given as frames; a video knows its own.", 12.0, 1, 120,
                      0.01)

NODES = (
    Node("LanceKitModelLoader", "Lance Model Loader",
         "Finds and loads a Lance checkpoint, float or 4-bit, from the models/lance folders.", "load_model",
         (Input("flavor", "COMBO", "Which Lance: the image model, the video model, or the small built-in lance-nano. "
                "auto takes the first that is installed, lance-nano if there is none.", "auto",
                choices=("auto", "Lance_3B", "Lance_3B_Video", "lance_nano")),
          Input("precision", "COMBO", "Which weights. auto: NVFP4 on Blackwell GPUs, else INT4, else bf16, of what is "
                "installed.", "auto", choices=("auto", "bf16", "awq_int4", "nvfp4")),
          Input("checkpoint", "COMBO", "auto, or one of the folders that were found.", "auto", choices="checkpoints"),
          Input("device", "COMBO", "auto is ComfyUI's own choice.", "auto", choices="devices"),
          Input("mode", "COMBO", "For 4-bit weights. ondemand: stay small, unpack in every step. cached: unpack once, "
                "as fast and as large as bf16.", "ondemand", choices=("ondemand", "cached"), advanced=True),
          Input("keep_loaded", "BOOLEAN", "Off: free all memory after every node that used the model.", True),
          Input("offload", "COMBO", "auto: ComfyUI moves language model, ViT and VAE to RAM when something needs the "
                "space. after_use: each gives up the GPU as soon as it is done.", "auto", choices=("auto", "after_use"),
                advanced=True),
          Input("vae_tiling", "BOOLEAN", "Decode large frames in overlapping tiles: much less memory, and the result "
                "differs a little.", False, advanced=True),
          Input("kernel", "COMBO", "What computes 4-bit weights in mode ondemand. auto: the fastest that this machine "
                "has. reference: plain PyTorch, slow, to compare with. native, triton, comfy_kitchen: this one or an "
                "error. native_w4a8: on CPUs, rounds activations to 8 bits as well: faster pictures, a little less "
                "exact. nvfp4_w4a4: for NVFP4 on Blackwell GPUs, rounds activations to 4 bits as well, which costs "
                "quality; simulated slowly elsewhere.", "auto",
                choices=("auto", "reference", "native", "triton", "comfy_kitchen", "native_w4a8", "nvfp4_w4a4"),
                advanced=True),
          Input("loras", "STRING", "LoRA files from models/loras, one a line: NAME, NAME:0.8, or per expert "
                "NAME:und=0.5,gen=1. They go on 4-bit weights as well.", "", multiline=True, advanced=True,
                optional=True)),
         (Output("model", "LANCE_MODEL", "For all other Lance nodes."),
          Output("info", "STRING", "What was loaded, from where, and why that.")),
         "Checkpoints are recognised by what is in a folder, whatever its name: `awq_meta.json` is INT4, "
         "`nvfp4_meta.json` NVFP4, `llm_config.json` with `model.safetensors` the float model. Every folder registered "
         "as `lance` is searched, those of `extra_model_paths.yaml` too. ViT, VAE, configuration and tokenizer are "
         "taken from beside the checkpoint, or from another Lance download that fits.\n\nWithout any model the "
         "built-in lance-nano is used: it draws circles, squares, triangles, crosses and digits at 112 x 112, "
         "and is there to try workflows."),
    Node("LanceKitTextToImage", "Lance Text to Image", "Draws pictures from a text.", "text_to_image",
         (_MODEL, _prompt("prompt", "What to draw.", "a red circle above a blue square, white background"),
          Input("size", "COMBO", "Width x height. auto: 768x768, or 112x112 for lance-nano.", "auto",
                choices=("auto", *IMAGE_SIZES, "custom")),
          *_CUSTOM_SIZE, _integer("batch", "How many pictures, with seeds counting up from seed.", 1, 1, 8), *_SAMPLING,
          *_ADVANCED), (_RESULT, _LATENT),
         "The seed of the n-th picture of a batch is seed + n - 1, so that each can be drawn again alone."),
    Node("LanceKitTextToVideo", "Lance Text to Video", "Makes a clip from a text.", "text_to_video",
         (_MODEL, _prompt("prompt", "What happens in the clip.", "a paper boat drifts on a quiet lake"),
          Input("size", "COMBO", "Width x height. auto: 848x480, or 112x112 for lance-nano.", "auto",
                choices=("auto", *VIDEO_SIZES, "custom")),
          *_CUSTOM_SIZE, *_CLIP_LENGTH, *_SAMPLING, *_ADVANCED), _CLIP,
         "Needs Lance_3B_Video. Time and memory grow with width x height x frames: begin with 360p and few frames."),
    Node("LanceKitImageToVideo", "Lance Image to Video", "Makes a clip that begins with a picture.", "image_to_video",
         (_MODEL, Input("image", "IMAGE", "The first frame; cropped to the nearest official ratio."),
          _prompt("prompt", "What happens in the clip.", "the boat drifts to the right"),
          _preset("video"), *_CLIP_LENGTH, *_SAMPLING, *_ADVANCED), _CLIP,
         "Needs Lance_3B_Video. The clip has the picture's ratio, out of 21:9, 16:9, 4:3, 1:1, 3:4 and 9:16."),
    Node("LanceKitImageEdit", "Lance Image Edit", "Changes a picture as an instruction says.", "image_edit",
         (_MODEL, Input("image", "IMAGE", "What to edit; every picture of a batch is edited."),
          _prompt("instruction", "What to change.", "make the circle green"),
          _preset("image"), *_SAMPLING, *_ADVANCED), (_RESULT, _LATENT),
         "The result has the size of the preset's bucket that fits the picture best, not the picture's own size."),
    Node("LanceKitVideoEdit", "Lance Video Edit", "Changes a clip as an instruction says.", "video_edit",
         (_MODEL, *_SOURCE, _prompt("instruction", "What to change.", "make the boat red"),
          _SOURCE_FPS, _WATCHED, _preset("video"),
          _integer("fps", "Frames per second that the result is marked with where keep length is off.", 12, 1, 60),
          *_SAMPLING, *_ADVANCED,
          Input("keep_length", "BOOLEAN", "The result lasts as long as the source, at whatever rate that takes, and "
                "keeps its sound. Off: frames per second says the rate, and there is no sound.", True, advanced=True,
                optional=True)), _CLIP,
         "Needs Lance_3B_Video. Of a clip of more than 6 seconds the model sees fewer frames than 12 a second, spread "
         "over its length; the result has as many, and lasts as long."),
    Node("LanceKitImageUnderstanding", "Lance Image Understanding", "Answers a question about pictures.",
         "image_understanding",
         (_MODEL, Input("image", "IMAGE", "What to look at; every picture of a batch is asked about."),
          _prompt("question", "What to ask.", "Describe the image."),
          _prompt("system", "The system prompt; the default is the official one for questions.",
                  "Look at the image carefully and answer the question."),
          _preset("image"), *_ANSWER),
         (Output("answer", "STRING", "One answer per picture.", is_list=True),),
         "At temperature 0 the same question about the same picture always gets the same answer."),
    Node("LanceKitVideoUnderstanding", "Lance Video Understanding", "Answers a question about a clip.",
         "video_understanding",
         (_MODEL, *_SOURCE, _prompt("question", "What to ask.", "What happens in the video?"),
          _prompt("system", "The system prompt; the default is the official one for questions.",
                  "Watch the video carefully and answer the question."),
          _SOURCE_FPS, _WATCHED, _preset("video"), *_ANSWER),
         (Output("answer", "STRING", "The answer."),),
         "Needs Lance_3B_Video. At temperature 0 the same question about the same clip always gets the same answer."),
    Node("LanceKitUnload", "Lance Unload", "Frees all memory of a Lance model, on the GPU and in RAM.", "unload",
         (_MODEL, Input("after", "*", "Connect what must be finished first; it is passed on unchanged.")),
         (Output("after", "*", "What came in, unchanged."),),
         "The model loads again by itself when a node needs it."),
    Node("LanceKitSelfCheck", "Lance Self Check",
         "Reports versions, devices, models, where the official source is, and what is missing.", "self_check", (),
         (Output("report", "STRING", "The report as text."),),
         "Run it first when something does not work, and put its text into a bug report.", is_output=True),
)
