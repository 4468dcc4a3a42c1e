"""ComfyUI entry of Anti-Memorization Guidance. Imports nothing before the host asks for nodes."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The extension, as ComfyUI's V3 loader expects it."""
    from .nodes import AMGExtension

    return AMGExtension()
