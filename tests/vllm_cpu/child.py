"""Runs vllm-omni's LancePipeline in this process and stores what it made; started by test_vllm_omni.py.

    python child.py JOB.json OUT.pt
"""

import contextlib
import json
import os
import socket
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import vllm_omni  # noqa: F401 - before lance_cpu, which it imports itself to learn of the platform
from PIL import Image

import lance_cpu  # isort: skip


class Omni:
    """Pipelines, one after the other."""

    def __init__(self):
        self.stack = contextlib.ExitStack()

    def build(self, root):
        """Load a folder; returns the pipeline."""
        from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
        from vllm_omni.diffusion.data import OmniDiffusionConfig
        from vllm_omni.diffusion.distributed import parallel_state
        from vllm_omni.diffusion.forward_context import set_forward_context
        from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader

        self.stack.close()
        self.stack = contextlib.ExitStack()
        config = OmniDiffusionConfig(model=root, dtype=torch.bfloat16)
        config.enrich_config()
        settings = VllmConfig()
        self.stack.enter_context(set_current_vllm_config(settings))
        self.stack.enter_context(set_forward_context(vllm_config=settings, omni_diffusion_config=config))
        if not parallel_state.model_parallel_is_initialized():
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
            parallel_state.init_distributed_environment(world_size=1, rank=0, backend="gloo")
            parallel_state.initialize_model_parallel(tensor_parallel_size=1)
        loader = DiffusersPipelineLoader(LoadConfig(), config)
        return loader.load_model(load_device="cpu", device=torch.device("cpu"))


def ask(pipeline, prompt, **sampling):
    """One request; its payload."""
    from vllm_omni.diffusion.request import OmniDiffusionRequest
    from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    request = OmniDiffusionRequest(prompt=prompt, sampling_params=OmniDiffusionSamplingParams(**sampling),
                                   request_id="0")
    return pipeline.forward(DiffusionRequestBatch([request])).output["payload"]


def outcome(function, *arguments):
    """What a call gives, or the error as one line."""
    try:
        return function(*arguments)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def as_on_cuda():
    """Make the two-expert linears believe that they are on CUDA; counts their calls of the per-expert path."""
    from vllm_omni.diffusion.models.bagel.mot import mot_qkv_parallel_linear as qkv
    from vllm_omni.diffusion.models.bagel.mot import mot_row_parallel_linear as row

    calls, kind = [], qkv.MoTQKVParallelLinear
    platforms, inner = [module.current_platform for module in (qkv, row)], kind._mot_fallback
    kind._mot_fallback = lambda self, *rest: calls.append(1) or inner(self, *rest)
    for module in (qkv, row):
        module.current_platform = type("Cuda", (), {"is_cuda": staticmethod(lambda: True)})
    try:
        yield calls
    finally:
        kind._mot_fallback = inner
        for module, platform in zip((qkv, row), platforms, strict=True):
            module.current_platform = platform


def two_experts(pipeline):
    """The first attention's fused projection on 2 text and 7 latent rows, on the CPU and as on CUDA."""
    layer = pipeline.bagel.language_model.model.layers[0].self_attn.qkv_proj
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(9, layer.input_size, generator=generator).bfloat16()
    und, gen = torch.tensor([0, 8]), torch.arange(1, 8)
    plain = layer(rows, und, gen)[0]
    with as_on_cuda() as calls:
        forced = layer(rows, und, gen)[0]
    return {"equal": torch.equal(plain, forced), "calls": len(calls)}


def angle_error():
    """Largest error of the rotary cosines up to position 1100, under autocast, of the real model's head width."""
    from vllm_omni.diffusion.models.bagel.bagel_transformer import BagelRotaryEmbedding

    rotary = BagelRotaryEmbedding(SimpleNamespace(hidden_size=128, num_attention_heads=1, rope_theta=1e6))
    places = torch.arange(1100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cosines = rotary(torch.zeros(1), places[None])[0][0, :, :64]
    return (cosines - torch.cos(places[:, None].double() * rotary.inv_freq.double())).abs().max().item()


def without(omni, job):
    """Each failure that the plugin repairs."""
    from vllm_omni.diffusion.models.lance.pipeline_lance import LancePipeline
    from vllm_omni_lance import loading, patching

    made = {"angles": angle_error(), "load": {name: outcome(omni.build, root) for name, root in job["roots"].items()}}
    patching.replace(LancePipeline, "__init__", loading._then(loading.put_bagel_first))
    made["nvfp4"] = outcome(omni.build, job["roots"]["nvfp4"])
    pipeline = outcome(omni.build, job["roots"]["int4"])
    made["int4"] = outcome(two_experts, pipeline)
    return {name: value if isinstance(value, str | dict | float) else "loaded" for name, value in made.items()}


def decoded(pipeline):
    """Values of every fused linear of both experts as the loaded layers hold them: an identity goes through."""
    found = {}
    for name, module in pipeline.bagel.language_model.named_modules():
        if not hasattr(module, "quant_method") or "layers." not in name:
            continue
        base = module if hasattr(module, "input_size_per_partition") else None
        if base is None or "head" in name:
            continue
        identity = torch.eye(base.input_size_per_partition, dtype=torch.bfloat16)
        found[name] = module.quant_method.apply(module, identity, None).t().contiguous()
    return found


def pictures(folder, names):
    return [Image.open(Path(folder) / name).convert("RGB") for name in names]


def run_tasks(pipeline, job):
    """Every task once or more; what it made, and what it started from."""
    from vllm_omni_lance import tasks

    sources, encode = [], tasks.encode
    tasks.encode = lambda *rest: sources.append(encode(*rest)) or sources[-1]
    made = {}
    try:
        for name, request in job.items():
            prompt = {"prompt": request["text"], "modalities": request["modalities"]}
            shown = pictures(".", request.get("pictures", []))
            if shown:
                prompt["multi_modal_data"] = {request["as"]: shown if request["as"] == "video" else shown[0]}
            sources.clear()
            payload = ask(pipeline, prompt, return_trajectory_latents=True, extra_args=request["extra"],
                          **request["sampling"])
            made[name] = {"text": payload.get("text"), "source": sources[0].float() if sources else None,
                          "latents": payload["trajectory"]["latents"].float() if "trajectory" in payload else None}
            frames = payload.get("video") or ([payload["image"]] if "image" in payload else [])
            made[name]["pixels"] = [torch.from_numpy(np.array(frame)) for frame in frames]
    finally:
        tasks.encode = encode
    return made


def with_plugin(omni, job):
    """Everything that works with the plugin."""
    made = {"angles": angle_error()}
    for name, root in job["roots"].items():
        pipeline = omni.build(root)
        made[name] = {"quantization": type(pipeline.od_config.quantization_config).__name__,
                      "first": next(iter(pipeline._modules)), "decoded": decoded(pipeline) if name != "float" else None,
                      "tasks": run_tasks(pipeline, job["tasks"][name])}
        if name == "int4":
            made[name]["cuda"] = two_experts(pipeline)
    return made


def main(job, out):
    import vllm_omni_lance

    job = json.loads(Path(job).read_text())
    if job["plugin"]:
        vllm_omni_lance.register()
        first = {name: vars(owner)[name] for owner, name in patched()}
        vllm_omni_lance.register()
        assert first == {name: vars(owner)[name] for owner, name in patched()}, "a second register() patched again"
    lance_cpu.stand_ins()
    torch.save((with_plugin if job["plugin"] else without)(Omni(), job), out)


def patched():
    from vllm_omni.diffusion.models.lance.pipeline_lance import LancePipeline

    return [(LancePipeline, "forward"), (LancePipeline, "__init__")]


if __name__ == "__main__":
    main(*sys.argv[1:])
