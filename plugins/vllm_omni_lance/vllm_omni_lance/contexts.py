"""Official contexts: what the model has read before it draws or answers, and at which positions.

A context is vllm-omni's own: the cache, its length (`kv_lens`) and the next position (`ropes`). The official sequence
of a drawing is

    system, user header | ViT of the source | source latents | prompt | assistant header | target

of which an edit has all and the others lack both visuals. The unconditional pass of guidance reads the same without the
prompt. Officially its cache is filled at the positions of the conditional one, while its target counts positions as if
the prompt were not there; the weights are used that way. An edit's target lies on the positions of its source.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm_omni.diffusion.models.lance.lance_transformer import NaiveCache
from vllm_omni.diffusion.models.lance.prompts import SYSTEM_PROMPTS

Context = dict[str, Any]
TAIL = "<|im_end|>\n<|im_start|>assistant\n"


class Source(NamedTuple):
    """What an edit starts from.

    patches, grid: for the ViT, see media.vit_patches
    pixels: for the VAE, [3, height, width] of a picture or [3, t, height, width] of a clip
    latent: what the VAE made of them, with a batch axis
    """

    patches: Tensor
    grid: Tensor
    pixels: Tensor
    latent: Tensor


class Contexts(NamedTuple):
    """Both passes' contexts, and the position of each one's target."""

    conditional: Context
    unconditional: Context
    place: int
    unconditional_place: int


def head(task: str) -> str:
    """The template in front of what the user gives; the apostrophes of edits are typographic, as officially."""
    system = SYSTEM_PROMPTS[task, "video" if task in ("t2v", "i2v", "video_edit") else "image"].replace("'", "’")
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"


def fork(context: Context) -> Context:
    """A context that goes its own way from here; tensors are shared, because reading makes new ones."""
    old = context["past_key_values"]
    cache = NaiveCache(old.num_layers)
    cache.key_cache.update(old.key_cache)
    cache.value_cache.update(old.value_cache)
    return {"kv_lens": list(context["kv_lens"]), "ropes": list(context["ropes"]), "past_key_values": cache}


def read(pipeline: Any, context: Context, update: Callable[..., Any], prepared: tuple[dict[str, Any], Any, Any],
         *first: Any) -> None:
    """Send prepared inputs, as vllm-omni's prepare_… functions give them, through the model into the cache."""
    inputs, lengths, ropes = prepared
    inputs = {name: value.to(pipeline.device) if torch.is_tensor(value) else value for name, value in inputs.items()}
    with torch.autocast(**pipeline._autocast_kwargs()):
        context["past_key_values"] = update(*first, context["past_key_values"], **inputs)
    context["kv_lens"], context["ropes"] = lengths, ropes


def read_vit(pipeline: Any, context: Context, patches: Tensor, grid: Tensor, edit: bool) -> None:
    """Read a picture or clip through the ViT. An edit's stands at time 1000; a question's follows the text."""
    inputs, lengths, ropes = pipeline.bagel.prepare_vit_videos(
        curr_kvlens=context["kv_lens"], curr_rope=context["ropes"], videos=[None],
        new_token_ids=pipeline.new_token_ids, precomputed_vit=[(patches, grid)])
    for name in pipeline._STALE_PREFILL_KEYS:
        inputs.pop(name, None)
    if not edit:
        times = inputs["packed_position_ids"][0]
        times += context["ropes"][0] - int(times[0])
    read(pipeline, context, pipeline.bagel.forward_cache_update_vit, (inputs, lengths, ropes))


def read_latents(pipeline: Any, context: Context, source: Source) -> None:
    """Read a source's latents, which are free of noise."""
    inputs, lengths, ropes = pipeline.bagel._lance_native_prepare_vae_images(
        curr_kvlens=context["kv_lens"], curr_rope=context["ropes"], images=[source.pixels],
        transforms=lambda pixels: pixels, new_token_ids=pipeline.new_token_ids, is_video=source.pixels.ndim == 4)
    inputs |= {"padded_images": None, "precomputed_latent": source.latent}
    read(pipeline, context, pipeline.bagel.forward_cache_update_vae, (inputs, lengths, ropes), pipeline.vae)


def contexts_of(pipeline: Any, task: str, prompt: str, source: Source | None = None) -> Contexts:
    """Read a drawing's request; see the module."""
    context, anchor = pipeline._new_gen_context(), None
    pipeline._raw_text_prefill(context, head(task))
    if source is not None:
        read_vit(pipeline, context, source.patches, source.grid, edit=True)
        anchor = context["ropes"][0]
        read_latents(pipeline, context, source)
    bare = fork(context)
    pipeline._raw_text_prefill(context, prompt)
    skipped = context["ropes"][0] - bare["ropes"][0]
    bare["ropes"] = list(context["ropes"])
    for each in (context, bare):
        pipeline._raw_text_prefill(each, TAIL)
    place = context["ropes"][0]
    return Contexts(context, bare, *((place, place - skipped) if anchor is None else (anchor, anchor)))
