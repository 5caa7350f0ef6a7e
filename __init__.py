"""The repository as a ComfyUI custom node: what ComfyUI loads where it was cloned into custom_nodes."""

if __package__:  # not when a tool reads this file by itself, from the root of the repository
    from .comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    WEB_DIRECTORY = "./comfyui/web"
    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
