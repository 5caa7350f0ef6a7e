"""POST /v1/images/generations, edits and variations: pictures, in the answer or by their URL."""

import base64
import json
import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request

from lance_quant.inference.pipeline import OnStep, Pipeline
from lance_quant.serving import inputs
from lance_quant.serving.openai_schemas import ImageRequest
from lance_quant.serving.service import ApiError, Service

VARIATION = "Make a variation of this image: keep its subject, and change the details."


def add_images(app: FastAPI, service: Service) -> None:
    """Add the routes to an application."""

    @app.post("/v1/images/generations", response_model=None)
    async def generations(request: Request, body: ImageRequest) -> dict[str, Any]:
        model = service.model(body.model)
        size: dict[str, Any] = {**(body.height_width or service.sizes.get(model, {}))}

        def draw(pipeline: Pipeline, seed: int, on_step: OnStep) -> Any:
            return pipeline.draw(body.prompt, seed=seed, on_step=on_step, **size, **body.sampling)

        return await _pictures(request, service, model, body, draw)

    @app.post("/v1/images/edits", response_model=None)
    async def edits(request: Request) -> dict[str, Any]:
        return await _edited(request, service, None)

    @app.post("/v1/images/variations", response_model=None)
    async def variations(request: Request) -> dict[str, Any]:
        return await _edited(request, service, VARIATION)


async def _edited(request: Request, service: Service, instruction: str | None) -> dict[str, Any]:
    fields, files = await inputs.read_form(request, ("image", "image[]"), "mask")
    body = inputs.parsed(ImageRequest, fields | ({"prompt": instruction} if instruction is not None else {}))
    model = service.model(body.model)
    if body.size not in (None, "auto"):
        raise ApiError(400, f"size {body.size}: an edit takes its size from its picture; leave size out, or name a "
                            "preset as resolution", param="size")
    if len(files) != 1:
        raise ApiError(400, f"{len(files)} images: an edit takes one", param="image")

    def edit(pipeline: Pipeline, seed: int, on_step: OnStep) -> Any:
        shown = inputs.picture(files[0], service.limits, "image")
        return pipeline.edit(shown, body.prompt, resolution=service.preset(model, body.resolution), seed=seed,
                             on_step=on_step, **body.sampling)

    return await _pictures(request, service, model, body, edit)


async def _pictures(request: Request, service: Service, model: str, body: ImageRequest,
                    make: Callable[[Pipeline, int, OnStep], Any]) -> dict[str, Any]:
    """n pictures with the seeds from `seed` on, in the form that was asked for."""
    count, fmt = body.n or 1, body.output_format or "png"
    if count > service.limits.pictures:
        raise ApiError(400, f"n {count} is above {service.limits.pictures}, this server's limit", param="n")
    inputs.require_steps(service, body)

    def work(pipeline: Pipeline, on_step: OnStep) -> list[bytes]:
        made = []
        for seed in range(body.seed, body.seed + count):
            told = {"prompt": body.prompt, "seed": seed, "model": model, **body.sampling}
            made.append(inputs.as_bytes(make(pipeline, seed, on_step), fmt, json.dumps(told, ensure_ascii=False)))
        return made

    made = await service.result(request, service.submit(model, work))
    data = []
    for content in made:
        if body.response_format == "url":
            name = service.results.put(content, f"image/{fmt}", fmt)
            data.append({"url": str(request.url_for("file", name=name))})
        else:
            data.append({"b64_json": base64.b64encode(content).decode()})
    return {"created": int(time.time()), "data": data, "output_format": fmt}
