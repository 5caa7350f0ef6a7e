"""/v1/videos: clips as jobs, with progress, content and an end to them."""

import tempfile
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from lance_quant.errors import InputError
from lance_quant.inference.pipeline import Clip, OnStep, Pipeline
from lance_quant.lance.config import LATENT_STRIDE
from lance_quant.lance.media.video import FPS
from lance_quant.serving import inputs
from lance_quant.serving.openai_schemas import VideoRequest
from lance_quant.serving.results import VideoJob
from lance_quant.serving.service import ApiError, Service


def add_videos(app: FastAPI, service: Service) -> None:
    """Add the routes to an application."""

    def found(name: str) -> VideoJob:
        if name not in service.videos:
            raise ApiError(404, f"no video {name[:60]!r}")
        return service.videos[name]

    @app.post("/v1/videos", response_model=None)
    async def create(request: Request) -> dict[str, Any]:
        return await _created(request, service)

    @app.get("/v1/videos", response_model=None)
    async def listed() -> dict[str, Any]:
        return {"object": "list", "data": [job.as_json() for job in reversed(service.videos.values())],
                "has_more": False}

    @app.get("/v1/videos/{name}", response_model=None)
    async def one(name: str) -> dict[str, Any]:
        return found(name).as_json()

    @app.get("/v1/videos/{name}/content", response_model=None)
    async def content(name: str) -> Response:
        job = found(name)
        if job.status != "completed":
            raise ApiError(400, f"the video is {job.status.replace('_', ' ')}: there is no content yet")
        kept = service.results.get(job.job.future.result().decode())
        if kept is None:
            raise ApiError(404, "the video was dropped for newer results: make it again")
        return Response(kept.content, media_type=kept.media_type)

    @app.delete("/v1/videos/{name}", response_model=None)
    async def delete(name: str) -> dict[str, Any]:
        job = found(name)
        service.engine.cancel(job.job)
        if job.status == "completed":
            service.results.drop(job.job.future.result().decode())
        del service.videos[name]
        return {"id": name, "object": "video.deleted", "deleted": True}


async def _created(request: Request, service: Service) -> dict[str, Any]:
    fields, files = await inputs.read_form(request, ("input_reference",))
    body = inputs.parsed(VideoRequest, fields)
    inputs.require_steps(service, body)
    if len(files) > 1:
        raise ApiError(400, f"{len(files)} input references: a clip begins with one", param="input_reference")
    job = _video_job(service, body, files[0] if files else None)
    service.videos[job.id] = job
    _forget_old(service)
    return job.as_json()


def _video_job(service: Service, body: VideoRequest, reference: bytes | None) -> VideoJob:
    model = service.model(body.model)
    frames = body.num_frames or (round(body.seconds * FPS) if body.seconds else 49)
    if frames > service.limits.frames:
        raise ApiError(400, f"{frames} frames are above {service.limits.frames}, this server's limit",
                       param="num_frames" if body.num_frames else "seconds")
    size: dict[str, Any] = dict(service.sizes.get(model, {}))
    if body.size is not None:
        width, height = map(int, body.size.split("x"))
        size = {"height": height, "width": width}
    for name, side in size.items():
        if side < LATENT_STRIDE:
            raise ApiError(400, f"{name} {side} must be at least {LATENT_STRIDE}", param="size")

    def work(pipeline: Pipeline, on_step: OnStep) -> bytes:
        options = {"seed": body.seed, "on_step": on_step, **body.sampling}
        if reference is None:
            made = pipeline.animate(None, body.prompt, num_frames=frames, **size, **options)
        else:
            made = _from_reference(pipeline, reference, body, service, model, frames, options)
        return service.results.put(_mp4(made), "video/mp4", "mp4").encode()

    shown = body.size or ("" if reference is not None else f"{size.get('width', '')}x{size.get('height', '')}")
    return VideoJob(model, body.prompt, shown.strip("x"), f"{frames / FPS:g}", service.submit(model, work))


def _from_reference(pipeline: Pipeline, reference: bytes, body: VideoRequest, service: Service, model: str, frames: int,
                    options: dict[str, Any]) -> Clip:
    """A clip that begins with a picture, or a clip that is edited."""
    preset = service.preset(model, body.resolution)
    try:
        shown = inputs.picture(reference, service.limits, "input_reference")
    except InputError:
        with inputs.clip(reference, service.limits, "input_reference") as path:
            return pipeline.edit_video(path, body.prompt, resolution=preset, **options)
    return pipeline.animate(shown, body.prompt, num_frames=frames, resolution=preset, **options)


def _mp4(made: Clip) -> bytes:
    with tempfile.TemporaryDirectory(prefix="lance-") as folder:
        path = Path(folder) / "clip.mp4"
        made.save(path)
        return path.read_bytes()


def _forget_old(service: Service) -> None:
    """Keep the objects of the newest thousand jobs; those that wait or run always."""
    done = [name for name, job in service.videos.items() if job.job.future.done()]
    for name in done[:max(0, len(service.videos) - 1000)]:
        del service.videos[name]
