"""Request bodies of the OpenAI API that the server understands, and what it asks beside them.

Field names are those of https://platform.openai.com/docs/api-reference; `seed`, `num_inference_steps`,
`guidance_scale` and `num_frames` are the names that vLLM and diffusers servers take beside them. A field that would
change the result and is not supported is refused, never ignored; fields without effect here (`user`, `metadata`) are
left alone.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lance_quant.lance.settings import MAX_NEW_TOKENS, Sampling, Settings

_DRAWN = Sampling()
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Url(BaseModel):
    """Where a part's file is: a data: URL."""

    url: str


class Part(BaseModel):
    """A part of a message: text, a picture, or a clip."""

    type: Literal["text", "image_url", "video_url", "input_text", "input_image"]
    text: str = ""
    image_url: Url | str | None = None
    video_url: Url | str | None = None


class Message(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None


class StreamOptions(BaseModel):
    """What the last chunk of a stream holds."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """Body of POST /v1/chat/completions."""

    model_config = ConfigDict(extra="allow")
    model: str = ""
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Seed = Settings.seed
    n: Literal[1] | None = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: None = None
    tools: None = None
    logprobs: Literal[False] | None = None
    resolution: str = ""

    @field_validator("stop", "tools", mode="before")
    @classmethod
    def _empty(cls, value: Any) -> None:
        if value not in (None, [], ""):
            raise ValueError("is not supported: leave it out")
        return None

    @property
    def most_tokens(self) -> int:
        """Longest answer."""
        return self.max_completion_tokens or self.max_tokens or MAX_NEW_TOKENS


class Drawing(BaseModel):
    """What all requests for pictures and clips have in common, JSON and forms alike."""

    model_config = ConfigDict(extra="allow")
    model: str = ""
    prompt: Annotated[str, Field(min_length=1)]
    seed: Seed = Settings.seed
    num_inference_steps: Annotated[int, Field(ge=1)] = _DRAWN.num_timesteps
    guidance_scale: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = _DRAWN.cfg_scale
    timestep_shift: Annotated[float, Field(ge=1e-6, le=1000, allow_inf_nan=False)] = _DRAWN.timestep_shift

    @property
    def sampling(self) -> dict[str, Any]:
        """For the Pipeline's methods."""
        return {"num_timesteps": self.num_inference_steps, "cfg_scale": self.guidance_scale,
                "timestep_shift": self.timestep_shift}


class ImageRequest(Drawing):
    """Body of POST /v1/images/generations, and the form of edits and variations."""

    n: Annotated[int, Field(ge=1)] | None = 1
    size: Annotated[str, Field(pattern=r"^(auto|\d{1,5}x\d{1,5})$")] | None = "auto"
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    stream: Literal[False] | None = False
    resolution: str = ""

    @property
    def height_width(self) -> dict[str, int]:
        """Height and width for the Pipeline; empty where the server is to choose."""
        if self.size in (None, "auto"):
            return {}
        width, height = map(int, str(self.size).split("x"))
        return {"height": height, "width": width}


class VideoRequest(Drawing):
    """Form of POST /v1/videos; `input_reference` is the picture that the clip begins with, or the clip to edit."""

    size: Annotated[str, Field(pattern=r"^\d{1,5}x\d{1,5}$")] | None = None
    seconds: Annotated[float, Field(gt=0, le=11, allow_inf_nan=False)] | None = None
    num_frames: Annotated[int, Field(ge=1)] | None = None
    resolution: str = ""
