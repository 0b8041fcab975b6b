"""The demo's command, and its page in a real browser."""

import base64
import contextlib
import os
import shutil
import signal
import socket
import urllib.request

import pytest
from PIL import Image

import vit_jax
from vit_jax.data.load import load

HAS_BROWSER = shutil.which("chromium") is not None and shutil.which("chromedriver") is not None
SECONDS = 60  # that a browser on a busy machine may take
# As a person drops a file: an element, and the file's bytes in base64.
DROP = """
const [place, content] = arguments;
const transfer = new DataTransfer();
transfer.items.add(new File([Uint8Array.from(atob(content), (c) => c.charCodeAt(0))], "dropped.png"));
place.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
"""


@contextlib.contextmanager
def serving(commands, workdir):
    """The address of the page while it is served."""
    process = commands.popen("demo", "--workdir", workdir, "--port", 0)
    try:
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), line + process.stderr.read()
        yield line.split()[0]
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "", "")


def test_the_page_is_served_until_it_is_interrupted(commands, finished):
    with serving(commands, finished) as address, urllib.request.urlopen(address) as response:
        assert b"<!doctype html>" in response.read() and response.headers["x-content-type-options"] == "nosniff"


def test_wrong_input(commands, finished, tmp_path):
    assert "no run in" in commands.fails("demo", "--workdir", tmp_path, "--port", 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        error = commands.fails("demo", "--workdir", finished, "--port", taken.getsockname()[1])
        assert "cannot listen on 127.0.0.1" in error and "another --host or --port" in error
    assert "cannot listen" in commands.fails("demo", "--workdir", finished, "--port", 99999)


@pytest.mark.parametrize("name", ["starlette", "uvicorn"])
def test_a_missing_extra_is_named(commands, tmp_path, name):
    (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name}', name='{name}')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    error = commands.fails("demo", "--workdir", tmp_path, environment={"PYTHONPATH": path})
    assert error == f'error: the page needs {name}: pip install "vit_jax[demo]"'


@pytest.fixture
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(SECONDS)
    yield driver
    driver.quit()


@pytest.mark.browser
@pytest.mark.skipif(not HAS_BROWSER, reason="chromium and chromedriver are not installed")
def test_the_page_in_a_browser(commands, finished, browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def all_of(selector):
        return browser.find_elements(By.CSS_SELECTOR, selector)

    def wait(condition):
        return WebDriverWait(browser, SECONDS, poll_frequency=0.05).until(lambda _: condition())

    def answered(source):
        """The labels and probabilities that are shown of a picture."""
        wait(lambda: all_of("#answer")[0].is_displayed() and all_of("#source")[0].text == source)
        return [item.text.split("\n") for item in all_of("#classes li")]

    def refused(words):
        return wait(lambda: words in all_of("#message.error")[0].text if all_of("#message.error") else False)

    split, classifier = load("digits", "test"), vit_jax.load(finished)
    found = classifier.predict(split.images)
    right = next(i for i, label in enumerate(split.labels) if found[i][0]["index"] == label)
    picture, note, large = (tmp_path / name for name in ("right.png", "note.png", "large.png"))
    Image.fromarray(split.images[right, ..., 0]).save(picture)
    note.write_text("no picture")
    large.write_bytes(bytes(11 * 2**20))

    with serving(commands, finished) as address:
        browser.get(address)
        wait(lambda: len(all_of("#samples button")) == 8)
        file = all_of("#file")[0]
        file.send_keys(str(picture))
        shown = answered("right.png")
        assert shown[0][0] == split.class_names[split.labels[right]] and len(shown) == 5
        assert shown == [[p["label"], f"{100 * p['probability']:.1f} %"] for p in found[right][:5]]
        for selector in ("#picture", "#attention", "#curves img", "#confusion img"):
            (image,) = all_of(selector)
            wait(lambda image=image: browser.execute_script("return arguments[0].naturalWidth > 100", image))
        bars = [float(bar.rect["width"]) for bar in all_of("#classes .bar > span")]
        whole = all_of("#classes .bar")[0].rect["width"]
        assert bars[0] == pytest.approx(whole * found[right][0]["probability"], abs=2)

        browser.execute_script(DROP, all_of("#drop")[0], base64.b64encode(picture.read_bytes()).decode())
        assert answered("dropped.png") == shown

        file.send_keys(str(note))
        refused("not a picture")
        file.send_keys(str(large))
        refused("10 MB")
        sample = all_of("#samples button")[2]
        sample.click()
        assert len(answered(f"a test picture of the class {sample.text}")) == 5

        browser.set_window_size(500, 800)
        inside = "const d = document.documentElement; return [d.scrollWidth, d.clientWidth]"
        assert browser.execute_script(inside)[0] <= browser.execute_script(inside)[1]
        messages = [entry["message"] for entry in browser.get_log("browser")]
        assert all("/predict" in message and "400" in message for message in messages), messages
