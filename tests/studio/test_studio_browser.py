"""The studio in a real browser: it draws while one watches, fills in what is painted, and keeps two browsers apart."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from jax_diffusion.cli.main import main
from jax_diffusion.studio import png

pytest.importorskip("gradio", reason='pip install "jax_diffusion[studio]"')

# The command, saying which hosts beyond this one it wanted anything of.
WATCHED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where it is ignored: tests in the background
def hook(event, arguments):
    if event == "socket.getaddrinfo" and arguments[0] not in (None, "", "localhost", "127.0.0.1", "0.0.0.0", "::1"):
        print("LEAVES", arguments[0], file=sys.stderr)
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in ("127.0.0.1", "::1"):
        print("LEAVES", arguments[1], file=sys.stderr)
sys.addaudithook(hook)
from jax_diffusion.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def command(run, tmp_path_factory):
    """The running command: its process, its url, and what it wrote to stderr."""
    errors = tmp_path_factory.mktemp("studio") / "stderr"
    with errors.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", WATCHED, "studio", f"--workdir={run.workdir}", "--port=0"],
            stdout=subprocess.PIPE, stderr=file, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    guard = threading.Timer(300, process.kill)
    guard.start()
    line = process.stdout.readline()
    guard.cancel()
    found = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert found, errors.read_text()[-3000:]
    assert line.startswith(f"studio of {run.workdir} at step 60: ")
    yield SimpleNamespace(process=process, url=found[0], errors=errors)
    process.kill()
    process.wait()


class Page:
    """The page as a user sees it."""

    def __init__(self, browser, url, **options):
        self.fetched, self.complaints = [], []
        context = browser.new_context(viewport={"width": 1300, "height": 1000}, accept_downloads=True, **options)
        self.page = context.new_page()
        self.page.set_default_timeout(60_000)
        self.page.on("request", lambda r: self.fetched.append(r.url))
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.goto(url)
        self.page.wait_for_selector("#sample-go")
        # Every picture that is shown, in turn.
        self.page.evaluate("""() => { window.shown = []; new MutationObserver(() => {
            const i = document.querySelector('#sample-picture img');
            if (i && i.src !== shown.at(-1)) shown.push(i.src) }
        ).observe(document.body, {childList: true, subtree: true, attributes: true}) }""")

    def fill(self, **fields):
        for name, value in fields.items():
            self.page.locator(f"#{name.replace('_', '-', 1)} input").first.fill(str(value))

    def choose(self, panel, solver):
        box = self.page.locator(f"#{panel}-solver input")
        box.fill(solver)
        self.page.get_by_role("option", name=solver, exact=True).click()

    def label(self, panel, *labels):
        box = self.page.locator(f"#{panel}-labels input")
        for label in labels:
            box.fill(label)
            box.press("Enter")
        box.press("Escape")

    def go(self, panel):
        self.page.click(f"#{panel}-go")

    def saved(self, panel):
        """The file that the link under the finished picture saves."""
        link = self.page.locator(f"#{panel}-picture a.save")
        link.wait_for()
        with self.page.expect_download() as download:
            link.click()
        return open(download.value.path(), "rb").read()

    def drawn(self, panel):
        """go, and the file of the new picture."""
        link = f"document.querySelector('#{panel}-picture a.save')"
        before = self.page.evaluate(f"() => {link}?.dataset.at")
        self.go(panel)
        self.page.wait_for_function(f"before => {link} && {link}.dataset.at !== before", arg=before)
        return self.saved(panel)

    def load(self, file):
        self.upload("load", file)

    def upload(self, button, file):
        chooser = self.page.locator(f"xpath=//button[@id='{button}']/preceding-sibling::input[@type='file']")
        chooser.set_input_files({"name": "saved.png", "mimeType": "image/png", "buffer": file})

    def alert(self, place):
        box = self.page.locator(f"#{place} [role=alert]")
        box.wait_for()
        return box.inner_text()


def pixels(file):
    return np.asarray(Image.open(io.BytesIO(file)))


@pytest.fixture(scope="module")
def opened(browser, command):
    return Page(browser, command.url)


def test_sampling_is_watched_and_saved_and_the_command_line_draws_the_same(opened, run, tmp_path):
    opened.choose("sample", "ddim")
    opened.fill(sample_steps=40, sample_seed=7, sample_num=3, sample_eta=0.5)
    opened.label("sample", "3", "8")
    file = opened.drawn("sample")
    assert opened.page.evaluate("new Set(shown).size") >= 4  # it sharpens while one looks
    said = opened.page.locator("#sample-progress").inner_text()
    assert re.search(r"3 images with ddim\(eta=0.5\), 40 evaluations, in \d+\.\d s", said)
    wide = opened.page.evaluate("document.querySelector('#sample-picture img').getBoundingClientRect().width")
    assert wide > 3 * pixels(file).shape[1]  # small images are enlarged
    line = [f"--workdir={run.workdir}", "--solver=ddim", "--steps=40", "--set", "eta=0.5", "--seed=7", "--num=3",
            "--labels=3,8", f"--out={tmp_path}/cli.png"]  # fmt: skip
    assert main(["sample", *line]) == 0
    np.testing.assert_array_equal(pixels(file), np.asarray(Image.open(tmp_path / "cli.png")))
    assert png.read_record(file)["settings"]["labels"] == [3, 8]


def test_a_saved_picture_brings_its_settings_back(opened):
    file = opened.saved("sample")
    opened.fill(sample_steps=3, sample_seed=1, sample_num=2)
    opened.choose("sample", "heun")
    opened.load(file)
    opened.page.get_by_text("The settings are back").wait_for()
    assert opened.page.locator("#sample-steps input").input_value() == "40"
    assert opened.page.locator("#sample-eta input").input_value() == "0.5"
    assert opened.drawn("sample") == file


def test_what_is_painted_over_is_filled_in(opened):
    opened.page.get_by_role("tab", name="Fill in").click()
    opened.fill(inpaint_steps=4, inpaint_num=2, inpaint_jump_length=2, inpaint_resamples=2)
    canvas = opened.page.locator("#canvas canvas")
    canvas.scroll_into_view_if_needed()
    opened.go("inpaint")
    assert "no mask is drawn" in opened.alert("inpaint-progress")
    box = canvas.bounding_box()
    mouse = opened.page.mouse
    mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.3)
    mouse.down()
    mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.3, steps=4)
    mouse.up()
    file = opened.drawn("inpaint")
    record = png.read_record(file)
    fill = png.unpack(record["mask"], (8, 8)) > 127
    assert fill[2, 5:7].all() and not fill[:, :3].any() and not fill[5:].any()
    tile = 48  # pixels, and a margin of 2; image, mask and two fillings are two rows
    corners = [(2 + 50 * (i // 2), 2 + 50 * (i % 2)) for i in range(4)]
    tiles = [pixels(file)[y : y + tile, x : x + tile][::6, ::6, 0] for y, x in corners]
    image = png.unpack(record["image"], (8, 8, 1))[..., 0]
    np.testing.assert_array_equal(tiles[0], image)
    for filled in tiles[2:]:
        np.testing.assert_array_equal(filled[~fill], image[~fill])
        assert not np.array_equal(filled, image)
    # And back from the file: the mask is on the canvas again.
    opened.page.locator("#canvas button").click()
    opened.load(file)
    opened.page.get_by_text("The settings are back").wait_for()
    assert opened.drawn("inpaint") == file


def test_the_last_sample_or_an_uploaded_picture_can_be_filled_in(opened):
    canvas = opened.page.locator("#canvas canvas")
    look = "c => c.getContext('2d').getImageData(c.width / 2, c.height / 2, 1, 1).data.slice(0, 3).join()"
    opened.page.get_by_role("tab", name="Fill in").click()
    opened.page.get_by_label("last sample").click()
    opened.fill(index=2)
    opened.page.locator("#index input").press("Enter")
    opened.page.wait_for_function("() => document.querySelector('#inpaint-labels').innerText.includes('3')")
    opened.fill(index=99)
    assert "the last samples are 0 to 2" in opened.alert("message")
    opened.upload("upload", b"text")
    opened.page.locator("#message").get_by_text("no picture that can be read").wait_for()
    file = io.BytesIO()
    Image.new("RGB", (30, 50), (180, 180, 180)).save(file, "PNG")
    opened.upload("upload", file.getvalue())
    opened.page.wait_for_function(f"() => ({look})(document.querySelector('#canvas canvas')) === '180,180,180'")
    assert canvas.is_visible()


def test_stop_ends_a_drawing(opened):
    opened.page.get_by_role("tab", name="Sample").click()
    opened.fill(sample_steps=1000, sample_num=40)
    opened.go("sample")
    opened.page.locator("#sample-progress").get_by_text("of 1000 evaluations").wait_for()
    opened.page.click("#sample-stop")
    opened.page.locator("#sample-progress").get_by_text("Stopped.").wait_for()
    opened.fill(sample_steps=3)
    opened.go("sample")
    opened.page.locator("#sample-progress").get_by_text("3 evaluations").wait_for()  # the next begins, and ends
    assert png.read_record(opened.saved("sample"))["settings"]["steps"] == 3


def test_mistakes_are_said_in_the_page(opened):
    opened.page.get_by_role("tab", name="Sample").click()
    opened.fill(sample_steps=0)
    opened.go("sample")
    assert "steps=0: give a whole number from 1" in opened.alert("sample-progress")
    opened.fill(sample_steps=4)
    opened.label("sample", "37")
    opened.go("sample")
    opened.page.get_by_text("'37' is no class; there are 0 to 9").wait_for()
    for file, what in ((b"text", "no PNG"), (png.encode(np.zeros((4, 4, 3), np.uint8)), "no settings")):
        opened.load(file)
        opened.page.locator("#message").get_by_text(what).wait_for()


def test_two_browsers_at_a_time_each_get_their_own(browser, command, opened):
    opened.page.reload()
    opened.page.wait_for_selector("#sample-go")
    pages = [opened, Page(browser, command.url, color_scheme="dark")]
    files = []
    for i, page in enumerate(pages):
        page.choose("sample", ("ddim", "ddpm")[i])
        page.fill(sample_steps=(400, 300)[i], sample_seed=i, sample_num=3)
    for page in pages:
        page.go("sample")
    for page in pages:
        files.append(page.saved("sample"))
    for i, file in enumerate(files):
        said = png.read_record(file)["settings"]
        assert (said["solver"], said["steps"], said["seed"]) == (("ddim", "ddpm")[i], (400, 300)[i], i)
    alone = [page.drawn("sample") for page in pages]
    assert alone == files and not np.array_equal(pixels(files[0]), pixels(files[1]))
    colours = [p.page.evaluate("getComputedStyle(document.body).backgroundColor") for p in pages]
    assert colours[0] != colours[1]


def test_nothing_leaves_this_machine_and_ctrl_c_ends_it(opened, command):
    assert opened.complaints == []
    assert [u for u in opened.fetched if not u.startswith((command.url, "data:", "blob:"))] == []
    for host, status in (("localhost:80", 200), ("example.com", 400)):  # a name that is made to point here
        asked = urllib.request.Request(command.url, headers={"Host": host})
        try:
            answer = urllib.request.urlopen(asked)
        except urllib.error.HTTPError as e:
            answer = e
        assert answer.status == status
        if status == 200:
            assert not re.search(rb"(href|src)=.(https?:)?//", answer.read())
            assert "default-src 'self'" in answer.headers["content-security-policy"]
    opened.fill(sample_steps=1000, sample_num=20)
    opened.go("sample")
    opened.page.locator("#sample-progress .bar").wait_for()
    command.process.send_signal(signal.SIGINT)
    assert command.process.wait(60) == 130
    errors = command.errors.read_text()
    assert errors.splitlines()[-1] == "jax-diffusion: interrupted"
    assert "Traceback" not in errors and "LEAVES" not in errors
