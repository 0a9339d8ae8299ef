"""Routes of the page for styles: their names, and their thumbnails."""

from ..krea2_model.features.style_library import StyleError
from .style_library import user_library

LIST, PICTURE = "/krea2_kit/styles", "/krea2_kit/styles/thumbnail"
_LARGEST = 1 << 20


def add_style_routes() -> None:
    """Add the routes to ComfyUI's server; without a server there is no page."""
    # Imported here: tests and benchmarks run nodes without the server, which is slow to load.
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.routes.get(LIST)(list_styles)
        server.routes.get(PICTURE)(show_thumbnail)


async def list_styles(request):
    """The styles as JSON: name, what it consists of, and the time of its thumbnail or null."""
    from aiohttp import web  # noqa: TID251 - ComfyUI's server, which asks; nothing is fetched

    found, problems = user_library().styles()
    styles = [
        {
            "name": style.name,
            "summary": style.summary(),
            "built_in": style.is_built_in,
            "thumbnail": None if style.thumbnail is None else style.thumbnail.stat().st_mtime_ns,
        }
        for style in found
    ]
    return web.json_response({"styles": styles, "problems": problems})


async def show_thumbnail(request):
    """The thumbnail of a style by its name, which is looked up and never part of a path."""
    from aiohttp import web  # noqa: TID251 - ComfyUI's server, which asks; nothing is fetched

    try:
        path = user_library().get(request.query.get("name", "")).thumbnail
    except StyleError:
        path = None
    if path is None or path.is_symlink() or path.stat().st_size > _LARGEST:
        raise web.HTTPNotFound
    headers = {"Content-Type": "image/webp", "X-Content-Type-Options": "nosniff"}
    return web.Response(body=path.read_bytes(), headers=headers)
