"""The report's page in a real browser: it draws, it reads out values, it fits a phone."""

import json

import pytest

from jax_diffusion.cli.main import main


@pytest.fixture(scope="module")
def url(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    (folder / "metrics.jsonl").write_text((run.workdir / "metrics.jsonl").read_text() + '{"step": 70, "loss": NaN}\n')
    (folder / "speed.jsonl").write_text((run.workdir / "speed.jsonl").read_text())
    (folder / "samples").symlink_to(run.workdir / "samples")
    assert main(["report", f"--workdir={folder}", f"--out={folder / 'r.html'}"]) == 0
    return (folder / "r.html").as_uri()


def opened(browser, url, **options):
    """The page, and a list that says what it complains of and fetches."""
    shown, complaints = browser.new_context(**options).new_page(), []
    shown.on("pageerror", lambda e: complaints.append(str(e)))
    shown.on("console", lambda m: complaints.append(m.text))
    shown.on("request", lambda r: complaints.append(r.url) if not r.url.startswith(("data:", "file:")) else None)
    shown.goto(url)
    shown.wait_for_selector("#curves .chart svg path")
    return shown, complaints


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits_and_complains_of_nothing(browser, url, scheme, width):
    shown, complaints = opened(browser, url, color_scheme=scheme, viewport={"width": width, "height": 800})
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert shown.evaluate("[...document.querySelectorAll('.chart')].every(c => c.querySelector('path[stroke]'))")
    dark = shown.evaluate("getComputedStyle(document.documentElement).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark") and complaints == []
    assert shown.evaluate("document.querySelector('.film img').naturalWidth") > 100


def test_a_curve_reads_out_its_values(browser, url, run):
    shown, _ = opened(browser, url, viewport={"width": 1000, "height": 800})
    chart = shown.locator(".chart").first
    chart.locator("svg").focus()
    shown.keyboard.press("ArrowRight")
    shown.keyboard.press("ArrowRight")
    records = [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]
    expected = {r["step"]: r["loss"] for r in records if "loss" in r}
    tip = chart.locator(".tip").inner_text()
    assert "step 20" in tip and f"{expected[20]:.4g}"[:5] in tip
    box = chart.locator("svg").bounding_box()
    shown.mouse.move(box["x"] + box["width"] - 12, box["y"] + 80)
    assert "step 70" in chart.locator(".tip").inner_text() and "NaN" in chart.locator(".tip").inner_text()
    assert chart.locator("path.broken").count() == 1


def test_scale_smoothing_and_axis_change_the_curve(browser, url):
    shown, complaints = opened(browser, url, viewport={"width": 1000, "height": 800})
    seen = []

    def look():
        shown.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        seen.append(shown.evaluate("document.querySelector('.chart').querySelectorAll('path')[0].getAttribute('d')"))
        seen.append(shown.evaluate("document.querySelector('.chart svg').textContent"))

    look()
    shown.locator(".chart h4 button").first.click()
    look()
    paths = shown.locator(".chart").first.locator("path[stroke]").count()
    shown.locator(".controls input[type=range]").fill("0.9")
    look()
    assert shown.locator(".chart").first.locator("path[stroke]").count() == 2 * paths
    shown.locator(".controls select").select_option("hours")
    look()
    assert seen[0] != seen[2] and seen[1] != seen[3]  # the log scale moves points and labels
    assert " h" in seen[7] and " h" not in seen[5] and complaints == []


def test_dragging_looks_closer_and_a_double_click_sees_all_again(browser, url):
    shown, _ = opened(browser, url, viewport={"width": 1000, "height": 800})
    svg = shown.locator(".chart svg").first
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()
    y = box["y"] + 100
    before = svg.evaluate("e => e.textContent")
    shown.mouse.move(box["x"] + 200, y)
    shown.mouse.down()
    shown.mouse.move(box["x"] + 400, y)
    shown.mouse.up()
    shown.wait_for_function("() => view.range !== null")
    shown.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert svg.evaluate("e => e.textContent") != before
    shown.mouse.dblclick(box["x"] + 300, y)
    shown.wait_for_function("() => view.range === null")
