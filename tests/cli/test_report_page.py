"""`jax-diffusion report`: what the page says is what the workdir holds, however torn, long or empty that is."""

import base64
import html.parser
import io
import json
import math
import random

import numpy as np
import pytest
from PIL import Image

from jax_diffusion.cli.main import main
from jax_diffusion.reporting import page, series


class Page(html.parser.HTMLParser):
    """The JSON, the tables by name, the findings, the text, and whatever would be fetched."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.text, self.findings, self.fetched = {}, "", [], []
        self._rows = self._script = self._cell = None
        self.feed(text)
        self.data = json.loads(self._json, parse_constant=pytest.fail)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.fetched += [(tag, v) for k, v in attributes.items() if k in ("src", "href", "data", "action")]
        if tag == "script":
            self._script = attributes.get("id", "program")
        elif tag == "table":
            self._rows = self.tables.setdefault(attributes.get("data-table"), [])
        elif tag == "tr" and self._rows is not None:
            self._rows.append([])
        elif tag in ("td", "th") and self._rows is not None:
            self._rows[-1].append("")
        elif tag == "li":
            self.findings.append("")
        self._cell = tag if tag in ("td", "th", "li") else self._cell

    def handle_endtag(self, tag):
        if tag == "script":
            self._script = None
        if tag == "table":
            self._rows = None
        if tag == self._cell:
            self._cell = None

    def handle_data(self, data):
        if self._script == "data":
            self._json = data
        elif self._script is None:
            self.text += data
            if self._cell in ("td", "th") and self._rows:
                self._rows[-1][-1] += data
            elif self._cell == "li":
                self.findings[-1] += data


def report(*workdirs, out):
    assert main(["report", "--workdir=" + ",".join(map(str, workdirs)), f"--out={out}"]) == 0
    return Page(out.read_text())


def write(workdir, metrics=(), speed=(), starts=(), **files):
    workdir.mkdir(parents=True, exist_ok=True)
    for name, records in (("metrics", metrics), ("speed", speed), ("environment", starts)):
        (workdir / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for name, text in files.items():
        (workdir / name.replace("_", ".")).write_text(text)
    return workdir


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    return report(run.workdir, out=tmp_path_factory.mktemp("page") / "deep" / "report.html")


def test_every_figure_of_the_files_is_in_the_page(run, trained):
    (shown,) = trained.data["runs"]
    for name in ("metrics", "speed"):
        for record in records(run.workdir / f"{name}.jsonl"):
            for metric, value in record.items():
                if metric not in ("step", "time"):
                    found = shown["series"][metric]
                    at = found["s"].index(record["step"])
                    assert float(found["v"][at]) == pytest.approx(value, rel=1e-6)
    assert set(shown["series"]) == {row[0] for row in trained.tables["metrics"][1:]}
    drawn = [name for chart in trained.data["charts"] for name in chart["names"]]
    assert len(drawn) == len(set(drawn)) and {"loss", "val_loss", "grad_norm", "images_per_s"} <= set(drawn)
    (first, *_) = trained.data["charts"]
    assert first["title"] == "loss" and first["names"] == ["loss", "val_loss"]


def test_the_page_fetches_nothing(trained):
    assert trained.fetched == []
    assert "http" not in json.dumps(trained.data)


def test_the_samples_are_the_pictures(run, trained):
    (shown,) = trained.data["runs"][0]["samples"]
    kind, data = shown["src"].split(",")
    assert kind == "data:image/png;base64" and shown["step"] == 60
    assert base64.b64decode(data) == (run.workdir / "samples" / "step_00000060.png").read_bytes()


def test_config_environment_and_checkpoints_are_there(run, trained):
    fields = {row[0]: row[1:] for row in trained.tables["config"][1:]}
    assert fields["model.channels"][0] == "16" and fields["train.steps"][0] == "60"
    assert "seed" not in fields and "seed" in {row[0] for row in trained.tables["all-config"]}
    facts = {row[0]: row[1] for row in trained.tables["environment"][1:]}
    started = records(run.workdir / "environment.jsonl")[-1]
    assert facts["jax"] == started["versions"]["jax"] and facts["devices"] == "1 x cpu"
    assert [row[0] for row in trained.tables["checkpoints"][1:]] == ["30", "60"]
    assert "60 of 60" in trained.text and "1,617 examples" in trained.text


def test_a_torn_last_line_and_a_half_written_picture(run, tmp_path):
    lines = (run.workdir / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 70, "loss": 0.')
    (tmp_path / "config.json").write_text('{"seed": ')
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step_00000060.png").write_bytes(b"\x89PNG\r\n\x1a\n half")
    shown = report(tmp_path, out=tmp_path / "r.html").data["runs"][0]
    assert shown["series"]["loss"]["s"] == [10, 20, 30, 40, 50, 60] and shown["samples"] == []


def test_no_metrics_yet(run, tmp_path):
    (tmp_path / "config.json").write_text((run.workdir / "config.json").read_text())
    got = report(tmp_path, out=tmp_path / "r.html")
    assert got.data["charts"] == [] and "No metrics yet" in got.text and "config" in got.tables


def test_what_is_not_finite_is_shown_as_that(tmp_path):
    losses = [1.0, math.nan, math.inf, -math.inf, 0.5]
    workdir = write(tmp_path / "bad", [{"step": i, "loss": v} for i, v in enumerate(losses)])
    got = report(workdir, out=tmp_path / "r.html")
    assert got.data["runs"][0]["series"]["loss"]["v"] == [1, "NaN", "Infinity", "-Infinity", 0.5]
    assert "loss: not finite at 3 of 5 steps: 1, 2, 3" in got.findings


def test_a_hundred_thousand_lines_are_a_page_of_bounded_size(tmp_path):
    rng = random.Random(0)
    names = [f"norm/{i}" for i in range(40)]
    values = [[rng.random() for _ in range(2500)] for _ in names]
    metrics = [{"step": s, **{n: values[i][s % 2500] for i, n in enumerate(names[:2])}} for s in range(100_000)]
    metrics[54_321]["norm/0"], metrics[77_777]["norm/1"] = 99.5, -7.25
    metrics[33_333]["norm/0"] = math.nan
    metrics += [{"step": s, **{n: values[i][s] for i, n in enumerate(names)}} for s in range(2500)]
    out = tmp_path / "r.html"
    shown = report(write(tmp_path / "long", metrics), out=out).data["runs"][0]["series"]
    assert out.stat().st_size < 3e6
    first, second = shown["norm/0"], shown["norm/1"]
    assert len(first["s"]) <= series.MOST and first["n"] == 100_000
    assert (first["s"][0], first["s"][-1]) == (0, 99_999)
    assert first["v"][first["s"].index(54_321)] == 99.5 and second["v"][second["s"].index(77_777)] == -7.25
    assert first["v"][first["s"].index(33_333)] == "NaN"
    assert np.mean(first["mv"]) == pytest.approx(0.5, abs=0.02)


def test_thinning_keeps_what_it_says():
    rng = np.random.default_rng(0)
    for n, limit in ((5, 8), (9, 8), (1000, 50), (50_000, 200)):
        values = rng.standard_normal(n)
        whole = series.Series(np.arange(n) * 3, values)
        points, means = series.thin(whole, limit)
        assert len(points.steps) <= limit and (means is None) == (n <= limit)
        assert {values.min(), values.max(), values[0], values[-1]} <= set(points.values.tolist())
        assert np.all(np.diff(points.steps) > 0)
        assert np.all(np.isin(points.steps, whole.steps))
        if means is not None:
            assert len(means.steps) <= limit and abs(means.values.mean() - values.mean()) < 0.2


def test_restarts_rollbacks_and_skipped_steps_are_marked(tmp_path):
    metrics = [{"step": s, "loss": 1.0, "skipped": max(0, s - 5), "rollbacks": int(s > 6)} for s in range(1, 9)]
    starts = [{"step": s, "time": 1e9 + s, "command": ["x"]} for s in (0, 4)]
    speed = [{"step": s, "time": 1e9 + 60 * s, "images_per_s": 5.0} for s in range(1, 9)]
    files = {"dataset_json": json.dumps({"skipped": ["a.png", "<b>.png"]})}
    workdir = write(tmp_path / "hurt", metrics, speed, starts, **files)
    said = json.dumps({"time": 1e9, "line": "wandb fails & <script>alert(1)</script>"}) + "\n"
    (workdir / "warnings.jsonl").write_text(said)
    (workdir / "checkpoints" / "5.damaged").mkdir(parents=True)
    got = report(workdir, out=tmp_path / "r.html")
    (shown,) = got.data["runs"]
    assert [(m["kind"], m["step"]) for m in shown["marks"]] == [("restart", 4), ("rollback", 7)]
    assert shown["hours"]["v"] == pytest.approx([s / 60 for s in range(1, 9)])
    findings = "\n".join(got.findings)
    for words in ("3 steps were skipped", "1 times the run went back", "2 files of the data", "a.png, <b>.png",
                  "5.damaged", "started 2 times; again at step 4", "<script>alert(1)</script>"):  # fmt: skip
        assert words in findings, findings


def test_several_runs_in_the_same_axes(run, conditioned_run, tmp_path):
    got = report(run.workdir, conditioned_run.workdir, out=tmp_path / "r.html")
    names = [r["name"] for r in got.data["runs"]]
    assert len(set(names)) == 2 and all("loss" in r["series"] and r["samples"] for r in got.data["runs"])
    assert got.tables["config"][0][1:3] == names
    row = {r[0]: r[1:] for r in got.tables["config"]}["condition.name"]
    assert row[:2] == ["none", "low_resolution"]


def test_pictures_are_few_and_not_too_large(tmp_path, monkeypatch):
    folder = tmp_path / "many" / "samples"
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (400, 1600, 3), np.uint8)
    for i in range(60):
        Image.fromarray(noise if i == 59 else noise[:8, :8]).save(folder / f"step_{i:08d}.png")
    write(tmp_path / "many")
    shown = report(tmp_path / "many", out=tmp_path / "r.html").data["runs"][0]["samples"]
    assert len(shown) <= page.PICTURES and (shown[0]["step"], shown[-1]["step"]) == (0, 59)
    data = base64.b64decode(shown[-1]["src"].split(",")[1])
    assert Image.open(io.BytesIO(data)).size == (1200, 300)
    monkeypatch.setattr(page, "PICTURE_BYTES", 2000)
    assert len(report(tmp_path / "many", out=tmp_path / "r.html").data["runs"][0]["samples"]) == 2


def test_mistakes_are_one_line(run, tmp_path, capsys):
    for typed, words in (
        ([f"--workdir={tmp_path}"], ["holds no run", "jax-diffusion train"]),
        ([f"--workdir={run.workdir}", f"--out={tmp_path}"], [f"--out={tmp_path} is a folder"]),
        (["--workdir=,"], ["names no folder"]),
    ):
        assert main(["report", *typed]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and all(w in err for w in words), err
