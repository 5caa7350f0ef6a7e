"""HTTP repair: clips of Lance can be asked for over `/v1/videos`.

vllm-omni 0.30.0 serves these routes where a stage declares video as its output. Lance's one stage declares images,
although it makes both and the engine names every output by what it is; each request for a clip ends in `503 No final
video output stage found`.
"""

import sys
from collections.abc import Callable
from typing import Any

from vllm_omni_lance.patching import replace

_NAME = "is_video_generation_pipeline"
_HOME = "vllm_omni.entrypoints.openai"
_IMPORT_IT = (f"{_HOME}.serving_video", f"{_HOME}.serving_video_output_stream")


def patch() -> None:
    """Let Lance's stage count as one that makes clips; modules that took the function before get the new one."""
    from vllm_omni.entrypoints.openai import utils

    replace(utils, _NAME, _or_lance)
    for module in (sys.modules.get(name) for name in _IMPORT_IT):
        if module is not None:
            setattr(module, _NAME, getattr(utils, _NAME))


def is_lance(stage: Any) -> bool:
    """Whether a stage's configuration is that of the Lance pipeline."""
    return getattr(getattr(stage, "model_config", None), "model_arch", None) == "LancePipeline"


def _or_lance(original: Callable[..., bool]) -> Callable[..., bool]:
    def is_video_generation_pipeline(stage_configs: list[Any] | None) -> bool:
        return original(stage_configs) or any(map(is_lance, stage_configs or ()))

    return is_video_generation_pipeline
