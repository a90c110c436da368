"""EasyRef for ComfyUI: steer SDXL with a group of reference images that an MLLM reads together."""

# Empty when a tool imports this file on its own rather than as a package.
if __package__:
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
