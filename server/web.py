"""The page at ``/``: a few files of the package, no build step, nothing from elsewhere."""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI, HTTPException
from fastapi.responses import Response

__all__ = ["add_page"]

_TYPES = {
    "index.html": "text/html",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "versions.js": "text/javascript",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Serve the page and what it needs."""
    folder = files("specdec.server") / "page"
    contents = {name: (folder / name).read_bytes() for name in _TYPES}

    def answer(name: str) -> Response:
        return Response(contents[name], media_type=f"{_TYPES[name]}; charset=utf-8", headers=_HEADERS)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return answer("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        if name not in contents:
            raise HTTPException(404, f"there is no page/{name[:50]}")
        return answer(name)
