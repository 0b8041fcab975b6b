"""The page's server: what it answers, what it refuses, and that it lives on."""

import base64
import io
import re
import shutil
import zlib

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from vit_jax.analysis import figures, plots
from vit_jax.errors import UserError
from vit_jax.training import serving
from vit_jax.training.drawings import Subject
from vit_jax.training.predicting import Predictor


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    """A run's folder to add pictures to."""
    ignored = shutil.ignore_patterns("figures", "curves.png")
    return shutil.copytree(finished, tmp_path_factory.mktemp("served") / "run", ignore=ignored)


@pytest.fixture(scope="module")
def page(run):
    return serving.Page(Subject(run))


@pytest.fixture(scope="module")
def client(page):
    return TestClient(serving.make_app(page), raise_server_exceptions=False)


def assert_guarded(response):
    policy = response.headers["content-security-policy"].split("; ")
    assert policy[:2] == ["default-src 'self'", "img-src 'self' data:"] and "frame-ancestors 'none'" in policy
    assert response.headers["x-content-type-options"] == "nosniff"


def assert_refused(response, code, words):
    assert response.status_code == code and words in response.json()["error"]
    assert_guarded(response)


def pixels_of(url):
    kind, _, data = url.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_the_page_needs_nothing_from_elsewhere(client):
    kinds = {"/": "text/html", "/style.css": "text/css", "/script.js": "text/javascript"}
    for path, kind in kinds.items():
        response = client.get(path)
        assert response.status_code == 200 and response.headers["content-type"].startswith(kind)
        assert_guarded(response)
        assert not re.search(r"https?:|//[a-z]|@import|<style| style=| on\w+=", response.text)
    linked = set(re.findall(r'(?:src|href)="([^"#:]+)"', client.get("/").text))
    assert linked == {"style.css", "script.js", "curves.png", "confusion.png"}


def test_a_picture_is_answered(client, page, run):
    images, names = Subject(run).shown
    about = client.get("/run").json()
    assert about["samples"] == names and about["name"] == "run" and about["classes"] == 10
    assert about["accuracy"] == pytest.approx(page.about()["accuracy"]) and 0 < about["accuracy"] < 1
    data = client.get("/samples/1").content
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), images[1, ..., 0])
    answer = client.post("/predict", content=data).json()
    assert answer["predictions"] == Predictor(page.subject.run).predict(images[1])
    np.testing.assert_array_equal(pixels_of(answer["picture"]), plots.tile(images[1]))
    flow = page.subject.rollout(images[1:2])[0]
    np.testing.assert_array_equal(pixels_of(answer["attention"]), figures.overlay(images[1], flow))


def test_any_size_and_kind_of_picture(client):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 200, 4), np.uint8))
    for kind, mode in (("WEBP", "RGBA"), ("JPEG", "CMYK"), ("TIFF", "L"), ("GIF", "P"), ("BMP", "1")):
        file = io.BytesIO()
        image.convert("RGB").convert(mode).save(file, kind)
        response = client.post("/predict", content=file.getvalue())
        assert response.status_code == 200, response.text
        assert sum(p["probability"] for p in response.json()["predictions"]) <= 1


def bomb(width, height):
    """A PNG file of one bit a pixel, all black."""

    def chunk(kind, data):
        check = zlib.crc32(kind + data).to_bytes(4)
        return len(data).to_bytes(4) + kind + data + check

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([1, 0, 0, 0, 0])
    rows = zlib.compress(bytes((width // 8 + 1) * min(height, 1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_what_is_no_picture_is_refused_and_the_server_lives_on(client, page):
    good = page.samples[0][1]
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    for data in (b"", b"hello", b"<html><script>", postscript, b"\x89PNG\r\n\x1a\n"):
        assert_refused(client.post("/predict", content=data), 400, "not a picture that can be read")
    assert_refused(client.post("/predict", content=good[:-30]), 400, "this picture: ")
    for size in ((30_000, 30_000), (60_000, 1_000)):
        assert_refused(client.post("/predict", content=bomb(*size)), 400, "50 million pixels")
    assert client.post("/predict", content=good).status_code == 200


def test_large_uploads_are_refused(client):
    assert_refused(client.post("/predict", content=bytes(10 * 2**20 + 1)), 413, "10 MB")
    assert_refused(client.post("/predict", content=bytes(10 * 2**20)), 400, "not a picture")

    sent = []

    def endless():
        while len(sent) < 100:
            sent.append(2**20)
            yield bytes(2**20)

    assert_refused(client.post("/predict", content=endless()), 413, "10 MB")


def test_a_cut_off_upload(page):
    async def cut():
        return {"type": "http.disconnect"}

    request = serving.Request({"type": "http", "headers": []}, cut)
    with pytest.raises(serving.HTTPException) as error:
        serving.body(request).send(None)
    assert error.value.status_code == 400


@pytest.mark.parametrize(
    "path",
    [
        *("/../config.json", "/%2e%2e/config.json", "/..%2f..%2fetc%2fpasswd", "//etc/passwd", "/page/index.html"),
        *("/index.html", "/config.json", "/summary.json", "/checkpoints", "/figures/confusion.png", "/samples"),
        *("/samples/99", "/samples/-1", "/samples/0/../../config.json", "/samples/x", "/docs", "/openapi.json"),
    ],
)
def test_nothing_else_is_served(client, path):
    assert_refused(client.get(path), 404, "")


def test_other_methods_are_refused(client):
    assert_refused(client.get("/predict"), 405, "")
    for method in ("post", "put", "delete"):
        assert_refused(client.request(method, "/"), 405, "")


def test_the_runs_pictures_are_shown_where_there_are_any(client, run):
    assert client.get("/run").json()["pictures"] == []
    assert_refused(client.get("/confusion.png"), 404, "no confusion picture")
    (run / "figures").mkdir(exist_ok=True)
    (run / "figures" / "confusion.png").write_bytes(b"drawn")
    response = client.get("/confusion.png")
    assert response.content == b"drawn" and response.headers["content-type"] == "image/png"
    assert client.get("/run").json()["pictures"] == ["confusion"]


def test_a_bug_is_no_end(client, page, monkeypatch):
    monkeypatch.setattr(serving.figures, "overlay", lambda *arguments: 1 / 0)
    response = client.post("/predict", content=page.samples[0][1])
    assert response.status_code == 500 and "ZeroDivision" not in response.text
    assert_guarded(response)
    monkeypatch.undo()
    assert client.post("/predict", content=page.samples[0][1]).status_code == 200


def test_without_test_pictures(run, monkeypatch):
    def fail(*arguments):
        raise UserError("no network")

    monkeypatch.setattr(serving.Subject, "shown", property(fail))
    page = serving.Page(Subject(run))
    assert page.about()["samples"] == [] and page.notes == ["no test pictures on the page: no network"]
