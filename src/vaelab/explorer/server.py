"""The explorer's server: the page, what it needs, and two questions to the model; on this machine alone.

It writes nothing. What comes in is checked before the model sees it, and refused with a 4xx and one line of JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable
from importlib import resources
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vaelab import __version__
from vaelab.explorer.world import World

LARGEST_BODY = 2 * 2**20  # bytes; more where one image, or the codes of a film, take more
DIGITS = 25  # bytes of a number in JSON and of what parts it from the next, at most
ROWS = 64  # of a request, at most
CODES = 24  # that the page asks for at once: a film, or a gallery
FARTHEST = 1e3  # from 0 that a coordinate of z may be
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; style-src 'self'; object-src 'none'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

Endpoint = Callable[[Request], Awaitable[Response]]


def page_files() -> dict[str, bytes]:
    """The page's own files by name."""
    files = (resources.files("vaelab.explorer") / "page").iterdir()
    return {file.name: file.read_bytes() for file in files if PurePath(file.name).suffix in KINDS}


def application(world: World) -> Starlette:
    """The server of a world."""
    files = page_files()
    points, pixels = world.points(), world.pixels()
    info, described = json.dumps(world.info, allow_nan=False).encode(), json.dumps(openapi(world)).encode()
    latent, shape = world.model.latent_dim, math.prod(world.model.shape)

    def fixed(content: bytes, kind: str) -> Endpoint:
        async def answer(request: Request) -> Response:
            return Response(content, media_type=kind, headers=HEADERS)

        return answer

    async def decode(request: Request) -> Response:
        z = numbers(await body(request, most_bytes(latent, CODES)), "z", latent, -FARTHEST, FARTHEST, CODES)
        images = await run_in_threadpool(world.decode, z)
        return Response(images.tobytes(), media_type="application/octet-stream", headers=HEADERS)

    async def score(request: Request) -> Response:
        x = numbers(await body(request, most_bytes(shape)), "x", shape, 0.0, 1.0)
        found = await run_in_threadpool(world.score, x.reshape(-1, *world.model.shape))
        answer = {
            "loc": _finite(found.loc), "scale": _finite(found.scale), "mean": found.mean.reshape(len(x), -1).tolist(),
            "distortion": _finite(found.distortion), "rate": _finite(found.rate),
        }  # fmt: skip
        return JSONResponse(answer, headers=HEADERS)

    routes = [Route(f"/{name}", fixed(content, KINDS[PurePath(name).suffix])) for name, content in files.items()]
    routes += [
        Route("/", fixed(files["index.html"], "text/html")),
        Route("/run.json", fixed(info, "application/json")),
        Route("/points.bin", fixed(points, "application/octet-stream")),
        Route("/images.bin", fixed(pixels, "application/octet-stream")),
        Route("/openapi.json", fixed(described, "application/json")),
        Route("/api/decode", decode, methods=["POST"]),
        Route("/api/score", score, methods=["POST"]),
    ]
    # A page of another site whose name leads here (DNS rebinding) is refused by the name that it asks for.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    return Starlette(
        routes=routes, middleware=[hosts], exception_handlers={HTTPException: _refused, Exception: _failed}
    )


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, headers={**HEADERS, **(error.headers or {})})


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "the server failed; its terminal says why"}, 500, headers=HEADERS)


# --- what comes in --------------------------------------------------------------------------------------------------


async def body(request: Request, largest: int = LARGEST_BODY) -> Any:
    """The JSON of a request.

    Raises:
        HTTPException: 415, 413 or 400, saying what is wrong.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, "send application/json")
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > largest:
            raise HTTPException(413, f"a request may have {largest} bytes")
    try:
        return json.loads(bytes(content))
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the request is not JSON") from error


def numbers(
    content: Any, name: str, columns: int, least: float, largest: float, at_least: int = 1
) -> NDArray[np.float32]:
    """The rows of numbers (B, columns) that a request gives under a name; see ``most_rows`` for how many.

    Raises:
        HTTPException: 422, saying what is wrong.
    """
    if not isinstance(content, dict) or set(content) != {name}:
        raise HTTPException(422, f'send one object with one key, "{name}"')
    rows = content[name]
    if not isinstance(rows, list) or not 1 <= len(rows) <= most_rows(columns, at_least):
        raise HTTPException(422, f"{name} must be a list of 1 to {most_rows(columns, at_least)} rows")
    for row in rows:
        if not isinstance(row, list) or len(row) != columns:
            raise HTTPException(422, f"each row of {name} must be a list of {columns} numbers")
        for value in row:
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= largest:
                raise HTTPException(422, f"{name} must hold numbers from {least:g} to {largest:g}")  # NaN is none
    return np.array(rows, np.float32)


def most_rows(columns: int, at_least: int = 1) -> int:
    """How many rows of so many numbers a request may have: what fits into its bytes, whatever the numbers are."""
    return min(ROWS, max(at_least, LARGEST_BODY // (DIGITS * columns)))


def most_bytes(columns: int, at_least: int = 1) -> int:
    """How many bytes a request may have, into which so many rows are to fit."""
    return max(LARGEST_BODY, at_least * DIGITS * columns)


def _finite(values: NDArray[np.float32]) -> list[Any]:
    """Numbers for JSON, which has no NaN and no infinity: null in their place."""
    return [_finite(row) if row.ndim else float(row) if np.isfinite(row) else None for row in values]


# --- its description ------------------------------------------------------------------------------------------------


def openapi(world: World) -> dict[str, Any]:
    """The API in OpenAPI's words."""
    latent, pixels = world.model.latent_dim, math.prod(world.model.shape)

    def rows(columns: int, least: float, largest: float, at_least: int = 1) -> dict[str, Any]:
        row = {"type": "array", "minItems": columns, "maxItems": columns,
               "items": {"type": "number", "minimum": least, "maximum": largest}}  # fmt: skip
        return {"type": "array", "minItems": 1, "maxItems": most_rows(columns, at_least), "items": row}

    def asked(name: str, schema: dict[str, Any]) -> dict[str, Any]:
        content = {"type": "object", "required": [name], "additionalProperties": False, "properties": {name: schema}}
        return {"required": True, "content": {"application/json": {"schema": content}}}

    error = {"description": "refused", "content": {"application/json": {"schema": {
        "type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}}}}  # fmt: skip
    refused = {str(code): error for code in (400, 413, 415, 422)}
    binary = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    table = {"type": "array", "items": {"type": "array", "items": {"type": ["number", "null"]}}}
    vector = {"type": "array", "items": {"type": ["number", "null"]}}
    scored = {"type": "object", "required": ["loc", "scale", "mean", "distortion", "rate"], "properties": {
        "loc": table, "scale": table, "mean": table, "distortion": vector, "rate": vector}}  # fmt: skip

    def got(summary: str, content: dict[str, Any]) -> dict[str, Any]:
        return {"get": {"summary": summary, "responses": {"200": {"description": summary, "content": content}}}}

    return {
        "openapi": "3.1.0",
        "info": {"title": "vaelab explorer", "version": __version__, "description": world.info["title"]},
        "paths": {
            "/run.json": got("what the page says of the run", {"application/json": {"schema": {"type": "object"}}}),
            "/points.bin": got(
                f"float32, little-endian: places of {len(world.codes)} test images (2 each), their codes ({latent} "
                f"each), {len(world.draws)} draws from the prior ({latent} each)", binary),
            "/images.bin": got(f"the pixels of the same images, {pixels} bytes each", binary),
            "/api/decode": {"post": {
                "summary": f"Means of p(x|z) for up to {most_rows(latent, CODES)} codes: {pixels} bytes each",
                "requestBody": asked("z", rows(latent, -FARTHEST, FARTHEST, CODES)),
                "responses": {"200": {"description": "pixels", "content": binary}, **refused}}},
            "/api/score": {"post": {
                "summary": "Codes, reconstructions (0 to 255) and nats of "
                           f"up to {most_rows(pixels)} images of {pixels} pixels",
                "requestBody": asked("x", rows(pixels, 0.0, 1.0)),
                "responses": {"200": {"description": "scores", "content": {"application/json": {"schema": scored}}},
                              **refused}}},
        },
    }  # fmt: skip
