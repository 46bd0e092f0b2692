"""The page at `/`: a chat that shows how each token came. Plain files, no build step, no request to anywhere else."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from importlib import resources
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_POLICY = [
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "connect-src 'self'",
    "img-src 'self'",  # the page's icon; the model's text never becomes an image
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",  # text becomes HTML through DOMPurify alone
    "trusted-types dompurify",
]
CONTENT_SECURITY_POLICY = "; ".join(_POLICY)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
FOLDERS = ("js", "style", "vendor")


def routes() -> list[Route]:
    """Routes of the page: `/` is the page, and `/page/...` its scripts, styles and icon. The files are read once, here."""
    root = resources.files(__name__)
    served = {"/": root / "index.html", "/page/icon.svg": root / "icon.svg"}
    for folder in FOLDERS:
        for file in sorted((root / folder).iterdir(), key=lambda file: file.name):
            if _suffix(file) in MEDIA_TYPES:  # licences are for readers of the source
                served[f"/page/{folder}/{file.name}"] = file
    return [Route(path, _answer_with(file), methods=["GET"], include_in_schema=False) for path, file in served.items()]


def _suffix(file: Traversable) -> str:
    return "." + file.name.rpartition(".")[2]


def _answer_with(file: Traversable) -> Callable[[Request], Awaitable[Response]]:
    body = file.read_bytes()
    # "no-cache" lets a browser keep the file, but makes it ask each time whether the file has changed. So a browser never
    # mixes the scripts of two versions.
    headers = {**SECURITY_HEADERS, "Cache-Control": "no-cache", "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"'}
    media_type = MEDIA_TYPES[_suffix(file)]

    async def answer(request: Request) -> Response:
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("If-None-Match", "").split(",")]
        if headers["ETag"] in known:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=media_type, headers=headers)

    return answer
