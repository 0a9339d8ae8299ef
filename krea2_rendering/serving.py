"""`krea2 serve`: pictures over HTTP, by Ray Serve around a loaded pipeline."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import signal
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from krea2_model.cli.checks import check_machine, check_picture
from krea2_model.cli.errors import UsageError
from krea2_model.cli.model_files import take_from_models
from krea2_model.cli.progress import Console

from .images_api import ImageRequest, InputPictures, Limits, RequestError, read_request
from .ray_engine import ray_session, resources

APPLICATION = "krea2"
# How long the first request waits for others to share its call.
_WAIT_SECONDS = 0.02
# Where pictures come from: of a request's own, which others have no part in.
_INPUTS = ("edit", "start_image", "mask")


@dataclass
class Item:
    """A picture of a request that waits for its call of the model."""

    args: Namespace
    is_cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def group(self) -> str:
        """What pictures have in common that one call can paint."""
        own = {k: v for k, v in vars(self.args).items() if k not in ("prompt", "negative", "seed")}
        alone = id(self) if any(own[name] for name in _INPUTS) or self.args.regions else None
        return json.dumps([own, alone], default=str, sort_keys=True)


class Cancelled(Exception):
    """All who waited for a call have gone."""


@serve.deployment
class ImageServer:
    """A replica: a loaded model that answers requests, several in a call where they fit."""

    def __init__(self, args: Namespace, limits: Limits, token: str | None, threads: int | None):
        import torch

        from krea2_model.cli.painter import Painter

        if threads is not None:
            torch.set_num_threads(threads)
        self._args, self._limits, self._token = args, limits, token
        take_from_models(args)
        self._painter = Painter(args, check_machine(args), Console(quiet=True))
        self._takes_edits = self._painter.takes_edits(args)
        self._paint.set_max_batch_size(args.batch)  # type: ignore[attr-defined]
        self._routes = {
            ("GET", "/v1/models"): self._models,
            ("POST", "/v1/images/generations"): self._generations,
            ("POST", "/v1/images/edits"): self._edit,
        }

    async def __call__(self, request: Request) -> Response:
        path = request.url.path
        if path == "/health":
            return JSONResponse({"status": "ok"})
        try:
            self._check_token(request)
            if (answer := self._routes.get((request.method, path))) is None:
                raise RequestError(f"There is no {request.method} {path}.", status=404)
            return JSONResponse(await answer(request))
        except RequestError as error:
            return JSONResponse(error.body, error.status)

    async def _models(self, request: Request) -> dict[str, Any]:
        model = {"id": _model_name(self._args), "object": "model", "owned_by": "krea2"}
        return {"object": "list", "data": [model]}

    async def _generations(self, request: Request) -> dict[str, Any]:
        try:
            values = json.loads(await _body(request, self._limits))
        except ValueError as error:
            raise RequestError(f"The request is no JSON ({error}).") from error
        if not isinstance(values, dict):
            raise RequestError("The request is no JSON object.")
        return await self._answer(read_request(values, self._args, self._limits))

    async def _edit(self, request: Request) -> dict[str, Any]:
        _check_length(request, self._limits)
        async with request.form() as form:
            images = [
                await value.read()
                for name, value in form.multi_items()
                if name in ("image", "image[]") and not isinstance(value, str)
            ]
            mask = form.get("mask")
            drawn = None if mask is None or isinstance(mask, str) else await mask.read()
            values = {name: value for name, value in form.items() if isinstance(value, str)}
        asked = read_request(values, self._args, self._limits)
        with InputPictures(images, drawn, self._limits) as pictures:
            pictures.give_to(asked, values, self._takes_edits)
            return await self._answer(asked)

    async def _answer(self, asked: ImageRequest) -> dict[str, Any]:
        """The pictures of a request; a client that goes away takes them back."""
        items = [Item(args) for args in asked.pictures]
        try:
            images = await asyncio.gather(*(self._paint(item) for item in items))
        except asyncio.CancelledError:
            for item in items:
                item.is_cancelled.set()
            raise
        for image in images:
            if isinstance(image, Exception):
                raise _as_request_error(image)
        return await asyncio.to_thread(asked.answer, images)

    @serve.batch(max_batch_size=1, batch_wait_timeout_s=_WAIT_SECONDS)
    async def _paint(self, items: list[Item]) -> list[Image.Image | Exception]:
        """Pictures of requests that came within a moment of each other."""
        return await self._paint_all(items)

    async def _paint_all(self, items: list[Item]) -> list[Image.Image | Exception]:
        """A picture or an error for each item; those of one group share a call."""
        found: dict[int, Image.Image | Exception] = {}
        groups: dict[str, list[Item]] = {}
        for item in items:
            try:
                await asyncio.to_thread(check_picture, item.args)
            except Exception as error:
                found[id(item)] = error
            else:
                groups.setdefault(item.group, []).append(item)
        for group in groups.values():
            try:
                images: list[Any] = await asyncio.to_thread(self._paint_group, group)
            except Exception as error:
                images = [error] * len(group)
            found |= {id(item): image for item, image in zip(group, images, strict=True)}
        return [found[id(item)] for item in items]

    def _paint_group(self, items: list[Item]) -> list[Image.Image]:
        def stop_if_cancelled() -> None:
            if all(item.is_cancelled.is_set() for item in items):
                raise Cancelled

        stop_if_cancelled()
        rows = [item.args for item in items]
        pictures = self._painter.paint_together(rows, "", stop_if_cancelled)
        return [picture.image for picture in pictures]

    def _check_token(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._token is None or hmac.compare_digest(given.encode(), self._token.encode()):
            return
        raise RequestError("The token is missing or wrong.", status=401)


def deploy(args: Namespace) -> None:
    """Start the server in a Ray that runs; returns when it answers."""
    workers = resources(args)
    limits = Limits(args.max_images, args.max_side)
    options = {"num_cpus": workers.cpus, "num_gpus": workers.gpus}
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": args.host, "port": args.port})
    server = ImageServer.options(  # type: ignore[attr-defined]
        num_replicas=workers.workers,
        ray_actor_options=options,
        # One call of the model and the next; others wait at the proxy, and then are refused.
        max_ongoing_requests=2 * args.batch,
        max_queued_requests=args.max_queue,
    )
    application = server.bind(args, limits, args.token, workers.threads)
    serve.run(application, name=APPLICATION, route_prefix="/")


def run(args: Namespace) -> Iterator[str]:
    """Serve until it is stopped; gives the address."""
    take_from_models(args)
    check_machine(args)
    if not args.host.strip():
        raise UsageError("--host is empty, which is every network; expected a name or an address.")
    if args.token is not None and not args.token.strip():
        raise UsageError("--token is empty; expected a secret, or leave it out.")
    console = Console(args.quiet)
    if args.host not in ("127.0.0.1", "localhost", "::1") and args.token is None:
        console.note(f"note: whoever reaches {args.host} may use this server; --token asks for one")
    quiet = args.quiet or not args.verbose
    with ray_session(args.address, quiet, include_dashboard=args.dashboard):
        with console.stage("loading the model"):
            deploy(args)
        try:
            # Ray aborts at SIGTERM, which is how containers and services are stopped.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            yield f"http://{args.host}:{args.port}/v1"
            while True:
                time.sleep(3600)
        finally:
            serve.shutdown()


async def _body(request: Request, limits: Limits) -> bytes:
    """The body of a request of JSON, which is text alone."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > 16 * limits.prompt:
            raise RequestError("The request is too long.", status=413)
    return bytes(body)


def _check_length(request: Request, limits: Limits) -> None:
    """Refuse a form that is too long before it is read."""
    length = request.headers.get("content-length", "")
    if not length.isdigit():
        raise RequestError("The request has no Content-Length.", status=411)
    if int(length) > limits.bytes + 16 * limits.prompt:
        raise RequestError(
            f"The request has {length} bytes; expected at most {limits.bytes} of pictures.",
            "image",
            413,
        )


def _as_request_error(error: Exception) -> Exception:
    """An error of the options as the client's; others are the server's own."""
    from krea2_model.cli.errors import explain, is_out_of_memory

    explained = explain(error)
    if isinstance(error, ValueError) and explained:
        return RequestError(explained[0])
    if is_out_of_memory(error):
        return RequestError("Memory ran out; ask for a smaller size.", "size", 507)
    return error


def _model_name(args: Namespace) -> str:
    return str(args.model or args.transformer or APPLICATION).rpartition("/")[2]
