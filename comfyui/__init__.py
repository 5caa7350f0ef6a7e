"""ComfyUI nodes for Lance: float, INT4 and NVFP4 checkpoints on lance-quant's own runtime, in ComfyUI's process.

Exports only. Importing this costs milliseconds and loads neither transformers nor diffusers; outside ComfyUI the
classes exist too, so that tests and tools can look at them.
"""

from . import classes, host

host.register_folder()

NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = classes.mappings()
WEB_DIRECTORY = "./web"

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
