"""A page on which a run can be tried: its own three files, its own endpoints, and nothing else.

GET  /, /style.css, /script.js        the page
GET  /run                             what the run is, JSON
GET  /curves.png, /confusion.png      its pictures, where there are any
GET  /samples/0, /samples/1, ...      some of its test pictures, PNG
POST /predict                         a picture's bytes → the most probable classes and what the model saw, JSON
"""

import base64
import io
import pathlib
import threading
from typing import Any

import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vit_jax.analysis import figures, plots
from vit_jax.errors import RunError, UserError
from vit_jax.training import runs
from vit_jax.training.drawings import Subject
from vit_jax.training.predicting import Predictor

FILES = pathlib.Path(__file__).parent / "page"
MOST_BYTES = 10 * 2**20
MOST_PIXELS = 50_000_000  # a small file may unpack to gigabytes
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # Pillow knows others that start programs
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class Page:
    """A run with what the page shows of it.

    Attributes:
      notes: what the page cannot show, and why.
    """

    def __init__(self, subject: Subject):
        self.subject = subject
        self.predictor = Predictor(subject.run)
        self.notes: list[str] = []
        self.pictures = {
            "curves": subject.workdir / "curves.png",
            "confusion": subject.workdir / "figures" / "confusion.png",
        }
        self.samples: list[tuple[str, bytes]] = []  # class and PNG
        self._turn = threading.Lock()
        try:
            images, names = subject.shown
            self.samples = [(name, png(image)) for image, name in zip(images, names, strict=True)]
        except (UserError, RunError) as error:
            self.notes.append(f"no test pictures on the page: {error}")
        side = subject.run.side
        self.answer(png(np.zeros((side, side, 3), np.uint8)))  # compiles: the first visitor need not wait

    def about(self) -> dict[str, Any]:
        """What the page says of the run."""
        run, summary = self.subject.run, runs.read_summary(self.subject.workdir) or {}
        return {
            "name": runs.name_of(self.subject.workdir),
            "weights": f"{run.weights} weights of step {run.step}",
            "classes": len(run.class_names),
            "accuracy": summary.get("test_accuracy"),
            "reader": self.subject.reader,
            "pictures": [name for name, path in self.pictures.items() if path.is_file()],
            "samples": [name for name, _ in self.samples],
        }

    def answer(self, data: bytes) -> dict[str, Any]:
        """The predictions for a picture's file, the picture as the model sees it, and its attention rollout.

        Raises:
          UserError: it is no picture, or too large a one.
        """
        with self._turn:  # one at a time, as memory is finite
            picture = self.subject.run.read(opened(data))
            flow = self.subject.rollout(picture[None])[0]
            return {
                "predictions": self.predictor.predict(picture),
                "picture": inline(plots.tile(picture)),
                "attention": inline(figures.overlay(picture, flow)),
            }


def opened(data: bytes) -> Image.Image:
    """The picture in a file's bytes. Raises UserError where there is none, or too large a one."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large() from error
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error and more
        kinds = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise UserError(f"This file is not a picture that can be read here: give a {kinds}.") from error
    if image.width * image.height > MOST_PIXELS:
        raise _too_large()
    return image


def _too_large() -> UserError:
    return UserError(f"This picture has more than {MOST_PIXELS // 10**6} million pixels: give a smaller one.")


def png(image: np.ndarray) -> bytes:
    """A picture, uint8 [h, w, C], as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    return file.getvalue()


def inline(image: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def make_app(page: Page) -> ASGIApp:
    """The page as an ASGI application."""

    def file(name: str, kind: str) -> Route:
        content = (FILES / name).read_bytes()
        return Route("/" if name == "index.html" else f"/{name}", lambda request: Response(content, media_type=kind))

    def picture(name: str, path: pathlib.Path) -> Route:
        def endpoint(request: Request) -> Response:
            if not path.is_file():
                raise HTTPException(404, f"This run has no {name} picture.")
            return Response(path.read_bytes(), media_type="image/png")

        return Route(f"/{name}.png", endpoint)

    def about(request: Request) -> Response:
        return JSONResponse(page.about())

    def sample(request: Request) -> Response:
        number = request.path_params["number"]
        if number >= len(page.samples):
            raise HTTPException(404, "There is no such test picture.")
        return Response(page.samples[number][1], media_type="image/png")

    async def predict(request: Request) -> Response:
        try:
            return JSONResponse(await run_in_threadpool(page.answer, await body(request)))
        except UserError as error:
            raise HTTPException(400, str(error)) from error

    routes = [
        file("index.html", "text/html"),
        file("style.css", "text/css"),
        file("script.js", "text/javascript"),
        *(picture(name, path) for name, path in page.pictures.items()),
        Route("/run", about),
        Route("/samples/{number:int}", sample),
        Route("/predict", predict, methods=["POST"]),
    ]
    return guarded(Starlette(routes=routes, exception_handlers={HTTPException: say}))


async def body(request: Request) -> bytes:
    """What was sent. Raises HTTPException where it is too much."""
    data = bytearray()
    try:
        async for chunk in request.stream():
            data += chunk
            if len(data) > MOST_BYTES:
                raise HTTPException(413, f"This file is larger than {MOST_BYTES >> 20} MB: give a smaller one.")
    except ClientDisconnect as error:
        raise HTTPException(400, "The upload was cut off.") from error
    return bytes(data)


def say(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


def guarded(app: ASGIApp) -> ASGIApp:
    """The application with HEADERS on every answer, errors included."""
    extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def answering(scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        await app(scope, receive, sending)

    return answering
