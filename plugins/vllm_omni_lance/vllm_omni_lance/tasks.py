"""The seven tasks of Lance as requests of vllm-omni, answered as the official code does.

`LancePipeline.forward` is replaced. Prompts, positions, guidance and preprocessing follow the official code; defaults
are the official ones (30 steps, shift 3.5, guidance 4 for 0.4 < t <= 1). A seed's noise is drawn on the CPU, so that it
is the same on every device and on every rank. Requests for what the official code does not have (a negative prompt,
image guidance, thinking, injected caches) and those with "official": false go to vllm-omni's own code.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from vllm_omni.diffusion.data import DiffusionOutput
from vllm_omni.diffusion.models.bagel import bagel_transformer
from vllm_omni.diffusion.models.lance.pipeline_lance import LancePipeline, _extract_user_instruction
from vllm_omni.errors import OmniClientError

from vllm_omni_lance import media
from vllm_omni_lance.contexts import Contexts, Source, contexts_of, read_vit
from vllm_omni_lance.patching import replace

_CHANNELS, _STRIDE, _LONGEST_SIDE, _MOST_FRAMES = 48, 16, 1024, 121
_SIDE, _CLIP, _FRAMES = 768, (480, 768), 50  # sizes where a request gives none: a picture's, a clip's and its length
_ANSWER = 256  # tokens
_SEED = 42


@dataclass(frozen=True)
class Wish:
    """One request.

    task: t2i, image_edit, t2v, i2v, video_edit, x2t_image or x2t_video
    prompt: the prompt as vllm-omni gets it, a dict
    sampling: its sampling parameters
    extra: model-specific arguments of prompt and sampling
    """

    task: str
    prompt: dict[str, Any]
    sampling: Any
    extra: dict[str, Any]

    @property
    def text(self) -> str:
        """What the user wrote, also where a client sends it inside the rendered template."""
        text = self.prompt.get("user_text") or self.prompt.get("prompt") or ""
        return _extract_user_instruction(text) if "<|im_start|>user" in text else text

    @property
    def seed(self) -> int:
        """The request's seed; without one the official default, the same on every rank."""
        return _SEED if self.sampling.seed is None else int(self.sampling.seed)

    @property
    def resolution(self) -> str:
        """Preset for the source of an edit, a question or a clip's first frame."""
        own = "video_480p" if self.task in ("i2v", "video_edit", "x2t_video") else "image_768res"
        name = self.extra.get("resolution", own)
        if name not in media.RESOLUTIONS:
            raise OmniClientError(f"resolution {name!r} is none of {', '.join(media.RESOLUTIONS)}")
        return name

    @property
    def num_frames(self) -> int:
        """Frames of a clip to make, floored to one more than a multiple of 4."""
        given = self.sampling.num_frames  # 1 where the client gave none
        count = int(self.extra.get("num_frames", given if given and given > 1 else _FRAMES))
        if not 1 <= count <= _MOST_FRAMES:
            raise OmniClientError(f"num_frames {count} is not 1 to {_MOST_FRAMES}: the model has no positions beyond")
        return (count - 1) // 4 * 4 + 1

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what is drawn, floored to multiples of 16."""
        sides = tuple(int(own or self.extra.get(f"video_{name}") or default) // _STRIDE * _STRIDE for name, own, default
                      in (("height", self.sampling.height, height), ("width", self.sampling.width, width)))
        if not all(_STRIDE <= side <= _LONGEST_SIDE for side in sides):
            raise OmniClientError(f"size {sides[1]} x {sides[0]}: a side must be {_STRIDE} to {_LONGEST_SIDE} pixels")
        return sides[0], sides[1]

    def guidance(self) -> dict[str, Any]:
        """Steps, schedule and guidance, as Bagel.generate_image takes them."""
        extra, sampling = self.extra, self.sampling
        # A request object fills guidance_scale with 1 where the client gave none.
        given = sampling.guidance_scale if sampling.guidance_scale_provided else 4.0
        return {"num_timesteps": int(sampling.num_inference_steps or 30),
                "timestep_shift": float(extra.get("timestep_shift", extra.get("flow_shift", 3.5))),
                "cfg_text_scale": float(extra.get("cfg_text_scale", given)), "cfg_img_scale": 1.0,
                "cfg_interval": tuple(extra.get("cfg_interval", (0.4, 1.0))),
                "cfg_renorm_type": str(extra.get("cfg_renorm_type", "global")),
                "cfg_renorm_min": float(extra.get("cfg_renorm_min", 0.0))}


def wish_of(prompt: Any, sampling: Any) -> Wish | None:
    """What a request asks for, or None for vllm-omni's own code."""
    given = prompt if isinstance(prompt, dict) else {"prompt": str(prompt)}
    extra = {**(given.get("extra_args") or {}), **(sampling.extra_args or {})}
    others = (sampling.past_key_values is not None, extra.get("think"), extra.get("official") is False,
              given.get("negative_prompt") or extra.get("negative_prompt"), float(extra.get("cfg_img_scale", 1.0)) > 1)
    task = task_of(set(given.get("modalities") or ["image"]), given.get("multi_modal_data") or {}, extra)
    return None if any(others) or task is None else Wish(task, given, sampling, extra)


def task_of(modalities: set[str], shown: dict[str, Any], extra: dict[str, Any]) -> str | None:
    """The task by what is asked for and what is shown; None for text without a picture."""
    picture = any(shown.get(name) is not None for name in ("image", "img2img", "first_frame"))
    clip = shown.get("video") is not None or extra.get("video_path") is not None
    if "text" in modalities:
        return "x2t_video" if clip else "x2t_image" if picture else None
    if "video" in modalities:
        return "video_edit" if clip else "i2v" if picture else "t2v"
    return "image_edit" if picture else "t2i"


def picture_of(wish: Wish) -> np.ndarray:
    """The picture of a request as a clip of one frame, uint8 [1, h, w, 3]."""
    shown = wish.prompt["multi_modal_data"]
    given = next(shown[name] for name in ("first_frame", "img2img", "image") if shown.get(name) is not None)
    return np.asarray(media.one_picture(given))[None]


def clip_of(wish: Wish) -> np.ndarray:
    """The frames that the model sees of a request's clip, uint8 [t, h, w, 3]."""
    given, fps = (wish.prompt.get("multi_modal_data") or {}).get("video"), float(wish.extra.get("origin_fps", 24.0))
    found = media.from_data_url(wish.extra["video_path"]) if given is None else media.frames_of(given, fps)
    return media.sampled(*found)


def encode(pipeline: LancePipeline, pixels: Tensor, seed: int) -> Tensor:
    """Latents of pixels with a batch axis, drawn around the encoder's mean from the request's seed."""
    torch.manual_seed(seed)  # also CUDA's
    return pipeline.vae.encode(pixels[None].to(pipeline.device))


def noise_of(cells: int, skipped: int, seed: int) -> Tensor:
    """x_T [cells, 48] of a seed. The official code draws an edit's source noise, too, in front of the target's."""
    drawn = torch.randn(skipped + cells, _CHANNELS, generator=torch.Generator().manual_seed(seed))
    return drawn[skipped:]


def draw(pipeline: LancePipeline, wish: Wish, read: Contexts, size: tuple[int, ...], noise: Tensor,
         pinned: int = 0) -> tuple[Tensor, list[Tensor] | None, list[Tensor] | None]:
    """Denoise; returns latents [cells, 48] and, if asked for, the trajectory.

    Args:
        size: (height, width) of a picture, (frames, height, width) of a clip.
        noise: x_T [cells, 48].
        pinned: cells at the front that are given and stay.
    """
    clip, ids = len(size) == 3, pipeline.new_token_ids
    prepare, bare = ((pipeline.bagel.prepare_video_latent, pipeline.bagel.prepare_video_latent_cfg) if clip else
                     (pipeline.bagel.prepare_vae_latent, pipeline.bagel.prepare_vae_latent_cfg))
    inputs = prepare(read.conditional["kv_lens"], [read.place], [size], ids)
    positions = bare(read.unconditional["kv_lens"], [read.unconditional_place], [size])["cfg_packed_position_ids"]
    for name in pipeline._STALE_PREFILL_KEYS:
        inputs.pop(name, None)
    inputs = {name: value.to(pipeline.device) for name, value in {**inputs, "packed_init_noises": noise}.items()}
    with torch.autocast(**pipeline._autocast_kwargs()), _guidance_on_every_rank(pinned > 0):
        latents, trajectory, times, _ = pipeline.bagel.generate_image(
            **inputs, **wish.guidance(), past_key_values=read.conditional["past_key_values"],
            cfg_text_past_key_values=read.unconditional["past_key_values"],
            cfg_text_packed_position_ids=positions.to(pipeline.device), cfg_img_past_key_values=None,
            cfg_img_packed_position_ids=None, return_trajectory_latents=bool(wish.sampling.return_trajectory_latents),
            frame_condition_token_indexes=torch.arange(pinned, device=pipeline.device) if pinned else None)
    return latents[0], trajectory, times


@contextlib.contextmanager
def _guidance_on_every_rank(wanted: bool) -> Iterator[None]:
    """Let every rank run both passes of guidance: vllm-omni's split of them over ranks forgets pinned cells."""
    if not wanted:
        yield
        return
    name = "get_classifier_free_guidance_world_size"
    ranks = getattr(bagel_transformer, name)
    setattr(bagel_transformer, name, lambda: 1)
    try:
        yield
    finally:
        setattr(bagel_transformer, name, ranks)


def make_picture(pipeline: LancePipeline, wish: Wish) -> DiffusionOutput:
    """t2i and image_edit."""
    if wish.task == "t2i":
        size, source, skipped = wish.size(_SIDE, _SIDE), None, 0
    else:
        frames = picture_of(wish)
        pixels = media.vae_pixels(frames, wish.resolution)[:, 0]
        size, skipped = tuple(pixels.shape[1:]), pixels[0].numel() // _STRIDE**2
        source = Source(*media.vit_patches(frames, wish.resolution), pixels, encode(pipeline, pixels, wish.seed))
    read = contexts_of(pipeline, wish.task, wish.text, source)
    noise = noise_of(size[0] * size[1] // _STRIDE**2, skipped, wish.seed)
    latents, trajectory, times = draw(pipeline, wish, read, size, noise)
    return pipeline._build_image_output(latents, size, trajectory_latents=trajectory, trajectory_timesteps=times,
                                        return_trajectory_decoded=wish.sampling.return_trajectory_decoded)


def make_clip(pipeline: LancePipeline, wish: Wish) -> DiffusionOutput:
    """t2v, i2v and video_edit."""
    if not pipeline._is_video:
        raise OmniClientError("this server has an image checkpoint: serve the folder Lance_3B_Video for clips")
    source, first, skipped = None, None, 0
    if wish.task == "t2v":
        size = (wish.num_frames, *wish.size(*_CLIP))
    elif wish.task == "i2v":
        pixels = media.vae_pixels(picture_of(wish), wish.resolution)
        size, first = (wish.num_frames, *pixels.shape[2:]), encode(pipeline, pixels, wish.seed)[0, :, 0]
    else:
        frames = clip_of(wish)
        pixels = media.vae_pixels(frames, wish.resolution)
        source = Source(*media.vit_patches(frames, wish.resolution), pixels, encode(pipeline, pixels, wish.seed))
        size = tuple(pixels.shape[1:])
        skipped = ((size[0] - 1) // 4 + 1) * size[1] * size[2] // _STRIDE**2
    read = contexts_of(pipeline, wish.task, wish.text, source)
    noise = noise_of(((size[0] - 1) // 4 + 1) * size[1] * size[2] // _STRIDE**2, skipped, wish.seed)
    if first is not None:
        first = first.flatten(1).t().float().cpu()
        noise = torch.cat([first, noise[len(first):]])
    latents, trajectory, times = draw(pipeline, wish, read, size, noise, 0 if first is None else len(first))
    frames = pipeline._decode_video_from_latent(pipeline.bagel, pipeline.vae, latents, size)
    payload: dict[str, Any] = {"video": [Image.fromarray(frame) for frame in frames]}
    if trajectory:
        payload["trajectory"] = {"latents": torch.stack(trajectory), "timesteps": torch.stack(times)}
    return DiffusionOutput(output={"payload": payload, "metadata": {"video": {"shape": size}}},
                           stage_durations=getattr(pipeline, "stage_durations", None))


def answer(pipeline: LancePipeline, wish: Wish) -> DiffusionOutput:
    """x2t_image and x2t_video."""
    clip = wish.task == "x2t_video"
    frames = clip_of(wish) if clip else picture_of(wish)
    prefix, suffix = pipeline._split_x2t_prompt(
        wish.prompt.get("prompt") or "", user_text_override=wish.extra.get("user_text"),
        system_prompt_override=wish.extra.get("system_prompt"),
        default_system_prompt=("Watch the video" if clip else "Look at the image")
        + " carefully and answer the question.")
    context = pipeline._new_gen_context()
    pipeline._raw_text_prefill(context, prefix)
    read_vit(pipeline, context, *media.vit_patches(frames, wish.resolution), edit=False)
    pipeline._raw_text_prefill(context, suffix)
    text = pipeline.tokenizer.decode(decode(pipeline, context, wish)).replace("<|im_end|>", "").strip()
    return DiffusionOutput(output={"payload": {"text": text}, "metadata": {"text": {"text_output": text}}},
                           stage_durations=getattr(pipeline, "stage_durations", None))


def decode(pipeline: LancePipeline, context: dict[str, Any], wish: Wish) -> list[int]:
    """Ids of an answer, until <|im_end|>; ids that the tokenizer has not got are never taken.

    Greedy; with "do_sample" drawn from the request's seed at "text_temperature".
    """
    model, valid = pipeline.bagel.language_model, len(pipeline.tokenizer)
    start = pipeline._x2t_prepare_assistant_start(context)
    token, place = (start[name].to(pipeline.device) for name in ("packed_start_tokens", "packed_query_position_ids"))
    draws = torch.Generator().manual_seed(wish.seed) if wish.extra.get("do_sample") else None
    cache, ids = context["past_key_values"], []
    for _ in range(int(wish.extra.get("max_think_tokens", _ANSWER))):
        with torch.autocast(**pipeline._autocast_kwargs()):
            out = model(packed_text_ids=token, query_lens=torch.ones_like(token), packed_query_position_ids=place,
                        past_key_values=cache, update_past_key_values=True, is_causal=True, mode="und")
            logits = model.lm_head(out.packed_query_sequence)[0, :valid].float()
        cache, place = out.past_key_values, place + 1
        ids.append(_pick(logits, draws, float(wish.extra.get("text_temperature", 0.3))))
        if ids[-1] == pipeline.new_token_ids["eos_token_id"]:
            break
        token = token.new_tensor([ids[-1]])
    return ids


def _pick(logits: Tensor, draws: torch.Generator | None, temperature: float) -> int:
    if draws is None:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1).cpu(), 1, generator=draws))


_RUN: dict[str, Callable[[LancePipeline, Wish], DiffusionOutput]] = {
    "t2i": make_picture, "image_edit": make_picture, "t2v": make_clip, "i2v": make_clip, "video_edit": make_clip,
    "x2t_image": answer, "x2t_video": answer}


def _official(original: Callable[..., Any]) -> Callable[..., Any]:
    @torch.inference_mode()
    def forward(self: LancePipeline, req: Any) -> DiffusionOutput:
        wish = wish_of(req.prompts[0], req.sampling_params) if req.prompts else None
        return original(self, req) if wish is None else _RUN[wish.task](self, wish)

    return forward


def patch() -> None:
    """Answer requests as the official code does."""
    replace(LancePipeline, "forward", _official)
