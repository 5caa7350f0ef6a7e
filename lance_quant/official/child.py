"""Child process: runs ByteDance's unedited inference_lance.py. Started by process.py, never imported.

The command line is the official one: `inference_lance.main()` parses it. What is ours comes as a JSON file named by
the environment: where the source and the VAE lie, the compute dtype, whether to record. It imports nothing of
lance_quant, because the interpreter is the one that the official pins are installed for.

What stands between the official code and this machine, all of it put in place from outside:

flash_attn     imported by modeling/lance/qwen2_navit.py. Always replaced by SDPA: a module of that name before the
               import if there is none, and the one function that is called, after it.
torch          as the official modules see it. They call for CUDA, and for bfloat16, by name; their global `torch`
               becomes one in which those names mean this machine's device and the dtype asked for. torch itself, and
               everybody else's view of it, stays as it is.
torchvision    wheels built for CUDA cannot register their operators with a CPU torch and fail at import; the official
               code needs no operators, only transforms, so the registration is left out.
VAE            modeling/vae/wan/vae2_2.py fixes the widths of the 2.8 GB file; a smaller file's are read from it. Its
               path is relative to the working directory and has no flag.
"""

import functools
import importlib
import importlib.util
import json
import os
import platform
import random
import sys
import threading
import time
import types
from importlib import machinery, metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

REQUEST = "LANCE_OFFICIAL_REQUEST"
# What a complete checkpoint may lack: made by a constructor, or in the ViT file.
_FROM_CONSTRUCTORS = ("latent_pos_embed.", "vit_model.")
_PACKAGES = ("torch", "transformers", "torchvision")


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
              max_seqlen_k: int, causal: bool = False) -> Tensor:
    """flash_attn_varlen_func by SDPA: packed sequences [tokens, heads, head_dim], cumulative lengths [sequences + 1].

    Query head h reads key/value head h // (heads / key heads). A causal mask ends at the bottom right: the last query
    sees every key.
    """
    outputs = []
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:]):  # noqa: B905  (equally long)
        mask = None
        if causal:
            mask = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool, device=q.device).tril(k1 - k0 - (q1 - q0))
        query, key, value = (part.transpose(0, 1)[None] for part in (q[q0:q1], k[k0:k1], v[k0:k1]))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


class TorchView(types.ModuleType):
    """`torch` under the official modules' global name: `changed` first, and the real module for all else."""

    def __init__(self, changed: dict[str, Any]):
        super().__init__("torch")
        vars(self).update(changed)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _OneCpu(int):
    """What torch.cuda.device_count() says where there is none: main() takes its device from `rank % count`."""

    def __rmod__(self, rank: int) -> torch.device:  # type: ignore[misc, override]  # no number, on purpose
        return torch.device("cpu")


def torch_view(device: str, dtype: torch.dtype) -> TorchView:
    """The view for a device, "cuda" or "cpu", and a compute dtype."""
    def autocast(device_type: str, dtype: torch.dtype | None = None, enabled: bool = True) -> torch.autocast:
        return torch.autocast(device, torch.bfloat16, enabled=enabled and reduced)

    reduced = dtype == torch.bfloat16
    changed: dict[str, Any] = {"bfloat16": dtype, "autocast": autocast,
                               "amp": types.SimpleNamespace(autocast=autocast)}
    if device == "cpu":
        def device_of(name: Any, *index: int) -> torch.device:
            return torch.device("cpu") if name == "cuda" else torch.device(name, *index)

        def nothing(*_: Any) -> None:
            """There is no GPU to select or to empty."""

        changed["device"] = device_of
        changed["cuda"] = types.SimpleNamespace(
            is_available=lambda: True, device_count=lambda: _OneCpu(1), set_device=nothing, empty_cache=nothing,
            ipc_collect=nothing)
    return TorchView(changed)


def load_official(source: str, device: str, dtype: torch.dtype) -> types.ModuleType:
    """Import inference_lance from a checkout, and give its modules our attention and view of torch."""
    sys.path[0] = source  # instead of this file's folder, whose names are lance_quant's
    if importlib.util.find_spec("flash_attn") is None:
        stand_in = types.ModuleType("flash_attn")
        stand_in.__spec__ = machinery.ModuleSpec("flash_attn", None)  # transformers asks for it
        vars(stand_in)["flash_attn_varlen_func"] = attention
        sys.modules["flash_attn"] = stand_in
    if torch.version.cuda is None:
        name = "torchvision._meta_registrations"
        sys.modules[name] = types.ModuleType(name)
    inference = importlib.import_module("inference_lance")
    view = torch_view(device, dtype)
    for module in list(sys.modules.values()):
        if str(getattr(module, "__file__", None)).startswith(source) and vars(module).get("torch") is torch:
            vars(module)["torch"] = view
    vars(sys.modules["modeling.lance.qwen2_navit"])["flash_attn_varlen_func"] = attention
    return inference


def set_vae(path: str) -> None:
    """Let the official VAE be built from the file at `path`, in the file's widths."""
    config = importlib.import_module("config.config_factory")
    config.get_model_path_config()["vae"]["wan"] = path  # the dictionary that get_model_path reads
    shapes = {name: tensor.shape for name, tensor in
              torch.load(path, map_location="meta", mmap=True, weights_only=True).items()}
    widths = {"dim": shapes["encoder.conv1.weight"][0], "dec_dim": shapes["decoder.head.0.gamma"][0]}
    names = vars(importlib.import_module("modeling.vae.wan.vae2_2"))
    build = names["_video_vae"]

    @functools.wraps(build)
    def in_the_files_widths(**arguments: Any) -> torch.nn.Module:
        return build(**{**arguments, **widths})

    names["_video_vae"] = in_the_files_widths


class Recorder:
    """What went through the official model, sample by sample, by hooks and around its own calls.

    Files NUMBER.safetensors, float32. Generation: x [steps, n, 48], t, velocity (guided), latent [t, h, w, 48], pixels
    [frames, height, width, 3] uint8; for an edit's source condition [t, h, w, 48], mean [48, t, h, w] and vit, for a
    first frame first [1, h, w, 48] and mean. Understanding: ids, logits [tokens, vocabulary], vit.
    """

    def __init__(self, folder: Path | None):
        self.folder, self.count, self._watched = folder, 0, False
        self._seen: dict[str, list[Tensor]] = {}

    def attach(self, model: Any) -> None:
        """Watch a model from now on."""
        if self.folder is None:
            return
        model.vae2llm.register_forward_pre_hook(lambda _, args: self._add("x", args[0]))
        model.time_embedder.register_forward_pre_hook(lambda _, args: self._add("t", args[0][-1:]))
        model.llm2vae.register_forward_hook(lambda _, args, out: self._add("v", out[1:-1]))
        model.vit_model.register_forward_hook(lambda _, args, out: self._add("vit", out))
        model.language_model.lm_head.register_forward_hook(lambda _, args, out: self._add("logits", out))
        for name, key in (("validation_gen_KVcache", "latents"), ("validation_und_KVcache", "ids")):
            setattr(model, name, self._keeping(getattr(model, name), key))

    def _add(self, name: str, value: Tensor) -> None:
        self._seen.setdefault(name, []).append(value.detach().float().cpu().clone())

    def _keeping(self, function: Any, key: str) -> Any:
        @functools.wraps(function)
        def kept(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            for value in (result[0][0] if key == "latents" else result[0]):
                self._add(key, value)
            return result

        return kept

    def watch_vae(self, vae: Any) -> None:
        """Keep the means that an official WanVideoVAE encodes to, and the pixels that it decodes to."""
        if self.folder is None or self._watched:
            return
        self._watched = True
        encode, decode = vae.vae.encode, vae.vae.decode

        def encoded(video: Tensor) -> Any:
            mean, log_variance = encode(video)
            self._add("mean", mean[0])
            return mean, log_variance

        def decoded(latent: Tensor) -> Tensor:
            pixels = decode(latent)
            self._add("pixels", pixels[0])
            return pixels

        vae.vae.encode, vae.vae.decode = encoded, decoded

    def finish(self, guidance: dict[str, Any], batch: Any) -> None:
        """Write the sample that ended; `batch` is the official collated one, from before it moved."""
        if self.folder is not None:
            from safetensors.torch import save_file

            seen, self._seen = self._seen, {}
            found = _answered(seen) if "ids" in seen else _drawn(seen, guidance, len(batch.mse_loss_indexes))
            save_file({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in found.items()},
                      self.folder / f"{self.count:06d}.safetensors")
        self.count += 1


def _answered(seen: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    return {"ids": seen["ids"][0][:, 0].long(), "logits": torch.cat(seen["logits"]), "vit": torch.cat(seen["vit"])}


def _drawn(seen: dict[str, list[Tensor]], guidance: dict[str, Any], denoised: int) -> dict[str, Tensor]:
    """The trace of one generation; the first call of vae2llm reads the context, the others are the steps.

    x_t holds an edit's source in front of the target, and i2v's fixed frame as the target's beginning.
    """
    latent, cells = seen["latents"][-1], len(seen["v"][0])
    times, passes, velocities = torch.cat(seen["t"][1:]), iter(seen["v"]), []
    for t in times.tolist():
        velocity = next(passes)
        if guidance["scale"] > 1 and guidance["low"] < t <= guidance["high"]:
            velocity = guided(velocity, next(passes), guidance)
        velocities.append(velocity)
    velocity = torch.stack(velocities)
    velocity[:, :cells - denoised] = 0  # the official loop moves the denoised cells only
    levels = seen["pixels"][-1].permute(1, 2, 3, 0).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    found = {"latent": latent, "x": torch.stack(seen["x"][1:])[:, -cells:], "t": times, "velocity": velocity,
             "pixels": levels}
    source = seen["x"][0][:-cells]
    if len(source):
        found |= {"condition": source.reshape(latent.shape), "mean": seen["mean"][0], "vit": torch.cat(seen["vit"])}
    elif denoised < cells:
        found |= {"first": found["x"][0, :cells - denoised].reshape(1, *latent.shape[1:]),
                  "mean": seen["mean"][0][:, :1]}
    return found


def guided(conditional: Tensor, unconditional: Tensor, guidance: dict[str, Any]) -> Tensor:
    """The velocity [n, 48] that the official loop takes (it is no value of its own there)."""
    mixed = unconditional + guidance["scale"] * (conditional - unconditional)
    if guidance["renorm"] == "none":
        return mixed
    over = (0, 1) if guidance["renorm"] == "global" else 1
    lengths = [velocity.norm(dim=over, keepdim=True) for velocity in (conditional, mixed)]
    return mixed * (lengths[0] / (lengths[1] + 1e-8)).clamp(0, 1)


class Kept:
    """Finished samples, in a folder that outlives this process: NUMBER.state.pt and, last, NUMBER.done.json.

    The official code draws from the global generators, sample after sample. So a finished sample is left out, what it
    answered is put back, and the generators go on where they stood behind it.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def has(self, number: int) -> bool:
        """Whether a sample is finished."""
        return self._path(number, "done.json").is_file()

    def put(self, number: int, said: dict[str, str]) -> None:
        """A sample is finished; `said`: what it added to the official prompt_data_dict."""
        numpy_state: Any = np.random.get_state(legacy=True)
        kind, keys, *rest = numpy_state
        state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": (kind, keys.tolist(), *rest),
                 "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}
        partial = self._path(number, "partial")
        torch.save(state, partial)
        os.replace(partial, self._path(number, "state.pt"))
        partial.write_text(json.dumps(said), encoding="utf-8")
        os.replace(partial, self._path(number, "done.json"))

    def restore(self, number: int) -> dict[str, str]:
        """The generators as they were behind a sample, and what it said."""
        state = torch.load(self._path(number, "state.pt"), weights_only=True)
        torch.set_rng_state(state["torch"])
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        if state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])
        said: dict[str, str] = json.loads(self._path(number, "done.json").read_text(encoding="utf-8"))
        return said

    def _path(self, number: int, kind: str) -> Path:
        return self._folder / f"{number:06d}.{kind}"


class Refused(Exception):
    """The official code would run, and mean nothing."""


def run(request: dict[str, Any], inference: types.ModuleType, device: str) -> dict[str, Any]:
    """Run the official main() on the command line, recording; what results.py puts into run.json."""
    recorder, kept = Recorder(Path(request["record"]) if request["record"] else None), Kept(Path(request["kept"]))
    marks, resumed = dict[str, float](), set[int]()
    started, names = time.perf_counter(), vars(inference)
    initialise, validate = names["init_from_model_path_if_needed"], names["validate_on_fixed_batch"]

    @functools.wraps(initialise)
    def checked(model: Any, *args: Any) -> Any:
        found = initialise(model, *args)
        lost = [name for name in found.missing_keys if not name.startswith(_FROM_CONSTRUCTORS)]
        if lost or found.unexpected_keys:  # the official main() goes on with random weights
            raise Refused(f"the checkpoint lacks {len(lost)} tensors, first {lost[:5]}, and has "
                          f"{len(found.unexpected_keys)} unknown ones, first {found.unexpected_keys[:5]}")
        recorder.attach(model)
        return found

    @functools.wraps(validate)
    def watched(**arguments: Any) -> None:
        marks.setdefault("load", time.perf_counter() - started)
        said = arguments["inference_args"].prompt_data_dict
        if kept.has(recorder.count):
            said.update(kept.restore(recorder.count))
            resumed.add(recorder.count)
            recorder.count += 1
            return
        before = dict(said)
        recorder.watch_vae(arguments["vae_model"])
        batch = types.SimpleNamespace(**vars(arguments["val_data_cpu"]))
        training, low_high = arguments["training_args"], arguments["training_args"].cfg_interval
        validate(**arguments)
        recorder.finish({"scale": arguments["model_args"].cfg_text_scale, "low": low_high[0], "high": low_high[1],
                         "renorm": training.cfg_renorm_type}, batch)
        kept.put(recorder.count - 1, {name: text for name, text in said.items() if name not in before})

    names.update(init_from_model_path_if_needed=checked, validate_on_fixed_batch=watched,
                 MAX_GENERATION_LENGTH=request["max_new_tokens"])
    set_vae(request["vae"])
    inference.main()
    marks["run"] = time.perf_counter() - started - marks["load"]
    peak = {"host": _host_peak()}
    if device == "cuda":
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return {"seconds": marks, "peak": peak, "samples": recorder.count, "resumed": len(resumed)}


def _host_peak() -> int | None:
    """Bytes; None on Windows, which has no `resource`."""
    if importlib.util.find_spec("resource") is None:
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _end_with_parent() -> None:
    """Nothing is ever written to standard input, and its end is that of the parent: what this process would write after
    that would come between the samples of the next run."""
    os.read(0, 1)
    os._exit(1)


def main() -> int:
    """Do what the request says, and answer in its reply file."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    request = json.loads(Path(os.environ[REQUEST]).read_text(encoding="utf-8"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    named = request["dtype"] if request["dtype"] != "auto" else {"cuda": "bfloat16", "cpu": "float32"}[device]
    torch.set_num_threads(request["threads"])
    reply: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else None, "dtype": named,
             "versions": {"python": platform.python_version()}}
    try:
        inference = load_official(request["source"], device, getattr(torch, named))
        reply["versions"] |= {name: metadata.version(name) for name in _PACKAGES}
    except ImportError as error:
        reply["cannot_import"] = f"{type(error).__name__}: {error}"
    else:
        try:
            reply |= run(request, inference, device)
        except Refused as error:
            reply["refused"] = str(error)
    Path(request["reply"]).write_text(json.dumps(reply), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
