"""The web page in a real browser: drawing, cancelling, a painted mask, two users, reloading, bad uploads and requests.

Needs gradio, playwright and a Chromium: pip install 'mindsigma[web]' playwright, apt-get install chromium.
"""

import io
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

pytest.importorskip("gradio", reason="no gradio: pip install 'mindsigma[web]'")

from test_picture_metadata import write_adapter

from mindsigma.choices import FAST
from mindsigma.pipeline.metadata import read

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
TIMEOUT = 120_000  # milliseconds that something on the page may take, on a machine that does other things, too
START, END = 180, 60  # seconds that the page may take to start and to end


@contextmanager
def running(folder, *flags):
    """Address of a page that tools/web.py serves, a process of its own that ends with the block, whatever happens.

    `folder`: for what it keeps; nothing of that is left behind.
    """
    folder.mkdir()
    command = [sys.executable, ROOT / "tools" / "web.py", "--port", "0", *map(str, flags)]
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    with open(folder / "said", "w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
    try:
        end, found = time.monotonic() + START, None
        while found is None:
            assert process.poll() is None and time.monotonic() < end, (folder / "said").read_text()
            time.sleep(0.1)
            found = re.search(r"open (http://\S+) in a browser", (folder / "said").read_text())
        assert list(folder.glob("mindsigma-web-*"))
        yield found[1]
        assert process.poll() is None, (folder / "said").read_text()
        process.terminate()
        assert process.wait(END) == 0, (folder / "said").read_text()
        assert not list(folder.glob("mindsigma-web-*")), "pictures are left behind"
    finally:
        process.kill()
        process.wait(END)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Address of a page with an adapter."""
    folder = tmp_path_factory.mktemp("served")
    write_adapter(folder / "style.safetensors")
    flags = ["--lora", folder / "style.safetensors", "--steps", "400", "--upload", "1"]
    with running(folder / "kept", *flags) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    path = next((found for found in map(shutil.which, BROWSERS) if found), None)
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"], timeout=TIMEOUT)
        yield opened
        opened.close()


@pytest.fixture
def user(browser, request):
    """user(address, width): a new page of a new user."""
    contexts = []

    def come(address, width=1280):
        context = browser.new_context(viewport={"width": width, "height": 1000}, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(TIMEOUT)
        page.goto(address)
        answers(page)
        return page

    yield come
    for context in contexts:
        if "SCREENSHOTS" in os.environ:  # a folder, to look at what a test left
            name = request.node.name.replace("/", "_")
            context.pages[0].screenshot(path=f"{os.environ['SCREENSHOTS']}/{name}-{contexts.index(context)}.png")
        context.close()


def answers(page):
    """Wait until the page does what is asked: what was drawn of it before is deaf."""
    page.locator("#facts").filter(has_text="One drawing at a time").wait_for()


def set_number(page, label, value):
    """Type into the number beside a slider, or a number field."""
    field = page.get_by_label(re.compile(label)).first
    field.fill(str(value))
    field.press("Tab")


def ask(page, prompt, steps=2, seed=None):
    """Fill the form."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    if not page.get_by_label("Guidance").first.is_visible():
        page.get_by_role("button", name="Sampling").click()
    set_number(page, "number input for Steps", steps)
    if seed is not None:
        set_number(page, "Seed", seed)
        page.get_by_label("Keep the seed").check()


def progress(page, text):
    """Wait until the line about progress holds a text."""
    page.locator("#progress").filter(has_text=re.compile(text)).wait_for()


def picture(page, number=0):
    """(PIL image, bytes) of a picture of the gallery."""
    source = page.locator("#gallery img").nth(number)
    source.wait_for()
    address = source.get_attribute("src")
    data = page.request.get(address).body()
    return Image.open(io.BytesIO(data)), data


def give(page, file):
    """Upload a PNG to be drawn again."""
    with page.expect_file_chooser() as chooser:
        page.locator("#again").click()
    chooser.value.set_files(str(file))


def test_draw_and_draw_again(user, served, mini, tmp_path):
    """The picture is that of the pipeline; its PNG fills in the form; choosing it tells how it was drawn."""
    page = user(served)
    ask(page, "a red apple", steps=3, seed=11)
    page.get_by_role("button", name="3:2", exact=True).or_(page.get_by_label("3:2", exact=True)).first.click()
    page.locator("#draw").click()
    progress(page, "Done: 1 picture")
    drawn, data = picture(page)
    options, digests = read(data)
    assert (options["prompt"], options["seed"], options["steps"]) == (["a red apple"], 11, 3)
    assert (options["height"], options["width"]) == drawn.size[::-1] and drawn.size[0] > drawn.size[1]
    assert set(digests) == {"dit", "vae", "t5"}
    size = {"height": options["height"], "width": options["width"]}
    expected = mini("a red apple", seed=11, num_inference_steps=3, progress=False, **size).images[0]
    assert np.abs(np.asarray(drawn.convert("RGB"), int) - np.asarray(expected, int)).max() <= 1

    page.locator("#gallery img").first.click()
    page.get_by_role("button", name="How the chosen picture was drawn").click()
    page.locator("#told").get_by_text("a red apple").first.wait_for()

    (tmp_path / "again.png").write_bytes(data)
    other = user(served)
    give(other, tmp_path / "again.png")
    progress(other, "Filled in from the picture")
    assert other.get_by_label("Prompt", exact=True).input_value() == "a red apple"
    other.locator("#draw").click()
    progress(other, "Done: 1 picture")
    np.testing.assert_array_equal(np.asarray(picture(other)[0]), np.asarray(drawn))


def test_progress_cancel_and_reload(user, served):
    """Steps are shown with a preview; cancelled, the page is ready again; who reloads leaves nothing behind."""
    page = user(served)
    ask(page, "a cat", steps=400)
    page.locator("#draw").click()
    progress(page, r"Step \d+ of 400")
    page.locator("#preview img").first.wait_for()
    page.locator("#cancel").click()
    progress(page, "Cancelled")
    assert page.locator("#gallery img").count() == 0
    page.locator("#draw").click()
    progress(page, r"Step \d+ of 400")
    page.reload()
    answers(page)
    ask(page, "a cat", steps=1)
    page.locator("#draw").click()
    progress(page, "Done: 1 picture")


def test_two_users_at_once(user, served):
    """The second waits and is told so; both get their own pictures."""
    first, second = user(served), user(served)
    ask(first, "a red apple", steps=30, seed=1)
    ask(second, "a rocket", steps=2, seed=2)
    first.locator("#draw").click()
    progress(first, r"Step \d+ of 30")
    second.locator("#draw").click()
    progress(second, "Waiting: 1 before this one")
    progress(first, "Done: 1 picture")
    progress(second, "Done: 1 picture")
    assert read(picture(first)[1])[0]["prompt"] == ["a red apple"]
    assert read(picture(second)[1])[0]["prompt"] == ["a rocket"]


def test_paint_a_mask(user, served, tmp_path):
    """A stroke over the middle: what is not under it stays as it was."""
    pixels = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "given.png")
    page = user(served)
    ask(page, "a red apple", steps=4)
    page.get_by_role("button", name="Draw from a picture").click()
    canvas = page.locator("#given canvas").first
    canvas.wait_for()
    with page.expect_file_chooser() as chooser:
        page.locator("#given button[aria-label*=pload]").first.click()
    chooser.value.set_files(str(tmp_path / "given.png"))
    page.wait_for_timeout(1500)
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.locator("#given button[aria-label=Brush]").click()
    page.mouse.move(x - 15, y)
    page.mouse.down()
    page.mouse.move(x + 15, y, steps=8)
    page.mouse.up()
    page.wait_for_timeout(500)
    page.locator("#draw").click()
    progress(page, "Done: 1 picture")
    drawn, data = picture(page)
    difference = np.abs(np.asarray(drawn.convert("RGB"), int) - pixels).max(2)
    assert drawn.size == (256, 256)
    assert difference[:20].max() == 0 and difference[-20:].max() == 0, "outside of the stroke"
    assert difference[112:144, 112:144].max() > 30, "under the stroke"
    assert read(data)[0]["mask"] == "uploaded picture"


def test_an_adapter(user, served, mini):
    page = user(served)
    ask(page, "a red apple", steps=2, seed=3)
    page.get_by_role("button", name="Model and adapters").click()
    page.get_by_label("style.safetensors").check()
    page.locator("#draw").click()
    progress(page, "Done: 1 picture")
    drawn, data = picture(page)
    assert read(data)[0]["lora"] == ["style.safetensors:1"] and "lora: style.safetensors" in read(data)[1]
    without = mini("a red apple", seed=3, num_inference_steps=2, progress=False, height=256, width=256).images[0]
    assert np.abs(np.asarray(drawn.convert("RGB"), int) - np.asarray(without, int)).mean() > 0.1


def test_fast(user, served):
    """It brings its sampler and steps; a picture of it fills in the form of another user."""
    page = user(served)
    ask(page, "a red apple", seed=3)
    page.get_by_label("Fast").check()
    steps = page.get_by_label(re.compile("number input for Steps")).first
    page.wait_for_function("field => field.value == 4", arg=steps.element_handle())
    page.locator("#draw").click()
    progress(page, "Done: 1 picture")
    options, _ = read(picture(page)[1])
    assert (options["sampler"], options["steps"], options["lora"]) == ("lcm", 4, [f"{FAST}:1"])
    page.get_by_label("Fast").uncheck()
    page.wait_for_function("field => field.value == 20", arg=steps.element_handle())


def test_bad_uploads(user, served, tmp_path):
    """Each ends in a line, and the page goes on."""
    page = user(served)
    (tmp_path / "text.png").write_text("no picture")
    give(page, tmp_path / "text.png")
    progress(page, "is no PNG")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    give(page, tmp_path / "plain.png")
    progress(page, "does not tell how it was drawn")
    noise = np.random.default_rng(0).integers(0, 255, (800, 800, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    give(page, tmp_path / "large.png")
    page.get_by_text(re.compile("exceed|too large|maximum", re.IGNORECASE)).first.wait_for()
    page.get_by_label("Prompt", exact=True).fill("")
    page.locator("#draw").click()
    progress(page, "prompt: tell what to draw")
    ask(page, "a cat", steps=1)
    page.locator("#draw").click()
    progress(page, "Done: 1 picture")


@pytest.mark.parametrize(
    "path",
    [
        "file=/etc/passwd", "gradio_api/file=/etc/passwd", "gradio_api/file=../../../../etc/passwd",
        "gradio_api/file=pyproject.toml", "gradio_api/file=mindsigma/__init__.py", "gradio_api/file=/proc/self/environ",
        "gradio_api/file=%2Fetc%2Fpasswd", "static/../../../../etc/passwd", "assets/..%2f..%2f..%2fetc%2fpasswd",
    ],
)  # fmt: skip
def test_no_path_of_the_host_is_reachable(served, path):
    """Not by a request of one's own either."""
    try:
        with urllib.request.urlopen(f"{served.rstrip('/')}/{path}", timeout=20) as answer:
            body = answer.read()
    except urllib.error.HTTPError as error:
        assert error.code in (403, 404, 405, 400)
        return
    assert b"root:" not in body and b"PATH=" not in body and b"mindone" not in body and b"__version__" not in body


def test_only_this_machine_is_let_in(served):
    assert served.startswith("http://127.0.0.1:")


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(user, served, width):
    page = user(served, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for name in ("Sampling", "Model and adapters", "Draw from a picture"):
        page.get_by_role("button", name=name).click()
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_controlnet(user, tmp_path):
    """One is chosen, a picture uploaded: it decides the shape, and the picture tells of it."""
    from control_cases import mini_controlnet, mini_edges

    from mindsigma.weights.saving import save_network

    save_network(mini_controlnet(), tmp_path / "edges")
    Image.fromarray(mini_edges()[64:192]).save(tmp_path / "given.png")
    with running(tmp_path / "kept", "--controlnet", tmp_path / "edges") as address:
        page = user(address)
        ask(page, "a red apple", steps=2, seed=3)
        page.get_by_role("button", name="Control by a picture").click()
        page.get_by_label("ControlNet", exact=True).click()
        page.get_by_role("option", name="edges").click()
        page.locator("#control_image input[type=file]").set_input_files(str(tmp_path / "given.png"))
        page.locator("#control_image img").first.wait_for()
        set_number(page, "number input for Weight", 0.5)
        page.locator("#draw").click()
        progress(page, "Done: 1 picture")
        drawn, data = picture(page)
        options, digests = read(data)
        assert drawn.size[0] > drawn.size[1] and "controlnet: edges" in digests
        assert options["controlnet"] == ["edges"] and options["control_image"] == ["uploaded picture"]
        assert options["control_scale"] == [0.5]
