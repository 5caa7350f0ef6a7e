"""Settings of a run, and what they may be: the seven tasks, presets of resolution, how pictures and tokens are sampled.

The defaults are the official ones, and this is where they are defined. No torch in here: command lines show defaults
and choices before the seconds are spent that its import takes.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

from lance_quant.errors import InputError, require_one_of, require_real, require_whole
from lance_quant.lance.config import LATENT_STRIDE, MAX_LATENT_FRAMES, MAX_LATENT_SIZE

SEED = 42  # of the noise
MAX_NEW_TOKENS = 256  # of an answer
MOST_STEPS, MOST_TOKENS = 10_000, 32_768  # that a request may ask for: all memory is taken at once
Modality = Literal["image", "video"]
Renorm = Literal["global", "channel", "none"]
Solver = Literal["euler", "ab2"]
Offload = Literal["none", "vae_vit", "cpu", "layers"]
OFFLOADS: tuple[Offload, ...] = get_args(Offload)
DTYPE_NAMES = ("float32", "bfloat16")  # of the computation
# Preset -> side of the square with the bucket's area: for the ViT, for the VAE.
RESOLUTIONS = {
    "image_112res": (112, 112),  # not an official preset: the native size of lance-nano
    "image_256res": (224, 256),
    "image_512res": (448, 512),
    "image_768res": (672, 768),
    "video_192p": (224, 256),
    "video_360p": (476, 480),
    "video_480p": (616, 640),
}


class TaskSpec(NamedTuple):
    """What a task takes beside text (None: nothing), what it makes, and the official preset for its visuals."""

    takes: Modality | None
    makes: Literal["text", "image", "video"]
    resolution: str


TASKS = {
    "x2t_image": TaskSpec("image", "text", "image_768res"),
    "x2t_video": TaskSpec("video", "text", "video_480p"),
    "t2i": TaskSpec(None, "image", "image_768res"),
    "t2v": TaskSpec(None, "video", "video_480p"),
    "i2v": TaskSpec("image", "video", "video_480p"),
    "image_edit": TaskSpec("image", "image", "image_768res"),
    "video_edit": TaskSpec("video", "video", "video_480p"),
}
TIMED = ("t2v", "i2v")  # what is made is as long as asked for


@dataclass(frozen=True)
class Sampling:
    """How a picture or clip is sampled; the defaults are the official ones.

    num_timesteps: denoising steps.
    timestep_shift: how far the schedule leans towards noise (`timesteps`).
    cfg_scale: strength of classifier-free guidance; 1 and less turn it off.
    batch_guidance: run both passes of guidance as one batch (same result, more memory) or one after the other.
    cfg_low, cfg_high: guidance is on where low < t <= high.
    cfg_renorm: how a velocity that guidance made longer than the conditional one is scaled back: by the norm over the
        whole target ("global"), by that of each cell ("channel"), or not at all ("none").
    solver: "euler", or "ab2", Adams and Bashforth's second order, which costs nothing more per step.
    reuse: how far in t a velocity may serve (generation.computed_steps); 0, the official way, computes every step's.

    Raises:
        InputError: a value is out of range, no number, or none of the names.
    """

    num_timesteps: int = 30
    timestep_shift: float = 3.5
    cfg_scale: float = 4.0
    batch_guidance: bool = True
    cfg_low: float = 0.4
    cfg_high: float = 1.0
    cfg_renorm: Renorm = "global"
    solver: Solver = "euler"
    reuse: float = 0.0

    def __post_init__(self) -> None:
        require_whole("num_timesteps", self.num_timesteps, 1, MOST_STEPS)
        require_real("timestep_shift", self.timestep_shift, 1e-6, 1000)
        require_real("cfg_scale", self.cfg_scale, 0, 1000)
        low, high = (require_real("cfg_interval", end, 0, 1) for end in (self.cfg_low, self.cfg_high))
        if low > high:
            raise InputError(f"cfg_interval {low:g} {high:g} must be two numbers from 0 to 1, the lower first")
        require_one_of("cfg_renorm", self.cfg_renorm, get_args(Renorm))
        require_one_of("solver", self.solver, get_args(Solver))
        require_real("reuse", self.reuse, 0, 1)

    def guided(self, t: float) -> bool:
        """Whether the unconditional pass runs at timestep t."""
        return self.cfg_scale > 1 and self.cfg_low < t <= self.cfg_high


@dataclass(frozen=True)
class TokenSampling:
    """How the next token is chosen: greedily (temperature 0, as officially), or drawn.

    temperature: divides the logits. top_p: only the likeliest tokens that together reach it are drawn from.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        require_real("temperature", self.temperature, 0, 1000)
        if require_real("top_p", self.top_p, 0, 1) == 0:
            raise InputError(f"top_p {self.top_p} must be above 0 and at most 1")


GREEDY = TokenSampling()


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run computes, given a model: two runs compare only if these agree.

    task: one of TASKS.
    resolution: preset for pictures and clips that are shown to the model; "": the task's own.
    height, width: pixels of what t2i and t2v make, floored to multiples of 16.
    num_frames: of what t2v and i2v make, floored to one more than a multiple of 4; 1 in all other tasks.
    seed: of the noise, and of tokens that are drawn; all samples share it.
    sampling: how pictures and clips are integrated. token_sampling: how the tokens of answers are chosen.
    fix_quirks: repair the official code's bugs instead of reproducing them.
    vae_tiling: let the VAE go through large frames in overlapping tiles: less memory, not quite the same pixels.

    Raises:
        InputError: a value is out of range or of the wrong type.
    """

    task: str
    resolution: str = ""
    height: int = 768
    width: int = 768
    num_frames: int = 50
    seed: int = SEED
    sampling: Sampling = Sampling()
    max_new_tokens: int = MAX_NEW_TOKENS
    token_sampling: TokenSampling = GREEDY
    fix_quirks: bool = False
    vae_tiling: bool = False

    def __post_init__(self) -> None:
        require_one_of("task", self.task, tuple(TASKS))
        object.__setattr__(self, "resolution", self.resolution or self.spec.resolution)
        require_one_of("resolution", self.resolution, tuple(RESOLUTIONS))
        if self.task not in TIMED:
            object.__setattr__(self, "num_frames", 1)
        require_whole("max_new_tokens", self.max_new_tokens, 1, MOST_TOKENS)
        for name in ("height", "width", "num_frames", "seed"):
            require_whole(name, getattr(self, name), 0 if name == "seed" else 1)
        if self.spec.takes is None:
            latent_grid(self.height, self.width, self.num_frames)
        else:  # the source says how large the result is
            latent_grid(LATENT_STRIDE, LATENT_STRIDE, self.num_frames)

    @property
    def spec(self) -> TaskSpec:
        """What the task takes and makes."""
        return TASKS[self.task]

    def as_json(self) -> dict[str, Any]:
        """The settings that matter to the task, for run.json. How guidance is batched changes no result."""
        given = {"task": self.task, "fix_quirks": self.fix_quirks}
        if self.spec.takes is not None:
            given["resolution"] = self.resolution
        if self.spec.makes == "text":
            drawn = asdict(self.token_sampling) | {"seed": self.seed}
            return given | {"max_new_tokens": self.max_new_tokens,
                            **(drawn if self.token_sampling.temperature else {"temperature": 0.0})}
        given["vae_tiling"] = self.vae_tiling
        if self.spec.takes is None:
            given |= {"height": self.height // 16 * 16, "width": self.width // 16 * 16}
        if self.task in TIMED:
            given["num_frames"] = (self.num_frames - 1) // 4 * 4 + 1
        sampling = asdict(self.sampling)
        first = {name: sampling.pop(name) for name in ("num_timesteps", "timestep_shift", "cfg_scale")}
        del sampling["batch_guidance"]
        if not self.sampling.reuse:  # as in folders that were written before there was reuse
            del sampling["reuse"]
        return given | first | {"seed": self.seed} | sampling


def latent_grid(height: int, width: int, num_frames: int = 1) -> tuple[int, int, int]:
    """Latent cells (frames, rows, columns) of a picture or clip.

    As officially, sides are floored to multiples of 16, and frames to one more than a multiple of 4, which a latent
    frame each stands for.

    Raises:
        InputError: a side is below 16 or above 1024 pixels, or there are no frames or more than 121.
    """
    rows, columns = height // LATENT_STRIDE, width // LATENT_STRIDE
    if not (1 <= rows <= MAX_LATENT_SIZE and 1 <= columns <= MAX_LATENT_SIZE):
        raise InputError(f"height {height} and width {width}: each side must be 16 to "
                         f"{MAX_LATENT_SIZE * LATENT_STRIDE} pixels")
    longest = 4 * MAX_LATENT_FRAMES - 3
    if not 1 <= num_frames <= longest:
        raise InputError(f"num_frames {num_frames} must be 1 to {longest}: the model has no positions beyond")
    return (num_frames - 1) // 4 + 1, rows, columns
