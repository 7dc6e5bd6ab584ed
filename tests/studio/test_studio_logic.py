"""The studio without a browser: settings, pictures with settings inside, frames, fillings, and what it refuses."""

import asyncio
import dataclasses
import io
import json
import shlex
import shutil
import socket
import sys

import jax
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from jax_diffusion import data, solvers
from jax_diffusion import model as models
from jax_diffusion.cli.main import main
from jax_diffusion.errors import UserError
from jax_diffusion.streaming import Stream, room
from jax_diffusion.studio import drawing, png, server
from jax_diffusion.studio import settings as said
from jax_diffusion.studio.settings import Settings


@pytest.fixture(scope="module")
def studio(run, tmp_path_factory):
    return drawing.Studio(shutil.copytree(run.workdir, tmp_path_factory.mktemp("studio") / "digits"))


def values(studio, **changed):
    """The fields of the page as they are when it opens, but for `changed`."""
    names = studio.model.class_names
    return {**said.show(said.of_recipe(studio.model), names), **changed}


# Streams


@pytest.mark.parametrize("solver, options", [("ddim", {}), ("ddpm", {}), ("dpmpp_2m", {}), ("heun", {"S_churn": 5.0})])
def test_a_stream_ends_with_the_samples_of_one_scan(studio, solver, options):
    model, key = studio.model, jax.random.key(3)
    table = solvers.make(solver, model.process.schedule, 6, **options)
    given = {"labels": [1, 2, 3], "guidance": 2.0}
    moments = list(studio.stream(key, table, 3, **given, pace=0.0))
    assert [m.done for m in moments] == list(range(1, len(table) + 1))
    whole, film = model.sample(key, table, 3, **given, trajectory=True)
    np.testing.assert_array_equal(*(np.asarray(data.to_uint8(x)) for x in (moments[-1].images, whole)))
    np.testing.assert_allclose(moments[-1].images, whole, atol=1e-5)
    np.testing.assert_allclose(np.stack([m.images for m in moments[:-1]]), film[:-1], atol=1e-5)


def test_neither_the_pace_nor_the_batches_nor_the_steps_matter_to_it(studio):
    stream, key = Stream(studio.model), jax.random.key(0)
    tables = [solvers.make(*a) for a in (("ddim", studio.model.process.schedule, 30),
                                         ("dpmpp_3m", studio.model.process.schedule, 9))]  # fmt: skip
    for table in tables:
        slow = list(stream(key, table, 3, labels=[5], batch_size=2, pace=0.0))
        fast = list(stream(key, table, 3, labels=[5], batch_size=2, pace=100.0))
        assert len(fast) < len(slow) == len(table) and fast[-1].done == len(table)
        np.testing.assert_array_equal(slow[-1].images, fast[-1].images)
    assert stream._advance._cache_size() == 1  # one program for all of it


def test_tables_have_room_for_more_rows(studio):
    assert [room(n) for n in (1, 64, 65, 1000)] == [64, 64, 128, 1024]
    with pytest.raises(UserError, match="rk45"):
        next(studio.stream(jax.random.key(0), solvers.make("rk45", studio.model.process.schedule, 4)))


# Settings


def test_fields_and_settings_are_the_same_thing(studio):
    fields = values(studio, solver="ddim", steps=7, eta=0.25, more="use_clipped_model_output=false rho=5",
                    grid="karras", labels=["3", "7"], seed=11, num=4, guidance=2.5)  # fmt: skip
    settings = said.read(studio.model, fields)
    assert settings.labels == (3, 7) and settings.options["eta"] == 0.25 and settings.options["rho"] == 5
    assert settings.options["use_clipped_model_output"] is False
    assert said.read(studio.model, said.show(settings, studio.model.class_names)) == settings
    assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_the_page_opens_with_the_recipe(studio):
    settings = said.read(studio.model, values(studio))
    ours, recipe = settings.table(studio.model), studio.model.default_table()
    np.testing.assert_array_equal(ours.B, recipe.B)
    assert settings.guidance == studio.model.config.sampling.guidance and settings.labels == tuple(range(10))


def test_labels():
    names = ("roses, red", "tulips", "3")
    assert said.parse_labels([], names) == (0, 1, 2) and said.parse_labels(["none"], names) is None
    assert said.parse_labels(["roses, red", "1", "3"], names) == (0, 1, 2)
    assert said.parse_labels(["none"], ()) is None and said.show_labels(None, names) == ["none"]
    assert said.show_labels((1, 2), names) == ["tulips", "3"] and said.show_labels((0, 1, 2), names) == []


MISTAKES = [
    ({"steps": 0}, "steps=0: give a whole number from 1"),
    ({"steps": None}, "steps is empty"),
    ({"steps": 2.5}, "steps=2.5"),
    ({"steps": float("nan")}, "steps=nan"),
    ({"steps": 2000}, "at most 1000"),
    ({"num": 101}, "number of images=101: give a whole number from 1 to 100"),
    ({"seed": -1}, "seed=-1"),
    ({"solver": "dimm"}, "did you mean 'ddim'"),
    ({"labels": ["37"]}, "'37' is no class; there are 0 to 9"),
    ({"labels": ["none", "3"]}, "'none' goes with no other"),
    ({"guidance": None}, "guidance is empty"),
    ({"solver": "ddim", "eta": None}, "eta is empty"),
    ({"solver": "repaint", "jump_length": 0, "resamples": 1, "eta": 1}, "jump_length=0"),
    ({"grid": "karas"}, "did you mean 'karras'"),
    ({"more": "eta"}, "eta=0.5"),
    ({"more": "speed=3"}, "speed"),
]


@pytest.mark.parametrize("changed, what", MISTAKES, ids=[str(next(iter(c.items()))) for c, _ in MISTAKES])
def test_a_mistake_in_a_field_is_named(studio, changed, what):
    with pytest.raises(UserError, match=what.replace("(", r"\(")) as error:
        said.read(studio.model, values(studio, **changed))
    assert "--" not in str(error.value)  # the page has no options


# Drawings


def last(shots):
    return list(shots)[-1]


def test_it_draws_what_the_command_line_draws_and_says_how(studio, tmp_path, capsys):
    settings = said.read(
        studio.model, values(studio, solver="ddim", steps=5, eta=0.5, labels=["3", "8"], num=5, seed=2)
    )
    shots = list(studio.sample(settings))
    assert shots[0].picture is None and [s.done for s in shots[1:]] == sorted(s.done for s in shots[1:])
    assert shots[-1].images.shape == (5, 8, 8, 1) and shots[-1].said.startswith("5 images with ddim(eta=0.5), 5 eval")
    record = png.read_record(shots[-1].file)
    assert record["settings"]["seed"] == 2 and record["kind"] == "sample"
    words = shlex.split(record["command"])
    assert words[0] == "jax-diffusion" and main([*words[1:], f"--out={tmp_path}/cli.png"]) == 0
    picture = np.asarray(Image.open(io.BytesIO(shots[-1].file)))
    np.testing.assert_array_equal(picture, np.asarray(Image.open(tmp_path / "cli.png")))


def test_a_solver_that_is_no_table_draws_in_one_go(studio):
    settings = Settings("predictor_corrector", 2, labels=(1,)).checked(studio.model)
    shots = list(studio.sample(settings))
    assert len(shots) == 2 and shots[0].rows == 0 and shots[1].images.shape == (1, 8, 8, 1)


def test_a_filling_keeps_what_is_known_and_is_the_command_line_s(studio, tmp_path):
    image, label = studio.held_out(4)
    fill = np.zeros((8, 8), bool)
    fill[2:6, 3:] = True
    options = {"jump_length": 2, "resamples": 2, "eta": 1.0}
    settings = Settings("repaint", 4, options=options, guidance=1.5, labels=(label,), seed=5, num=2)
    shot = last(studio.inpaint(settings.checked(studio.model), image, fill))
    np.testing.assert_array_equal(shot.images[:, ~fill], np.stack([image[~fill]] * 2))
    assert not np.array_equal(shot.images[0][fill], shot.images[1][fill])
    for name, array in (("image", image[..., 0]), ("mask", fill.astype(np.uint8) * 255)):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    line = (f"inpaint --workdir={studio.workdir} --images={tmp_path}/image.png --mask={tmp_path}/mask.png --variants=2 "
            f"--steps=4 --set jump_length=2 --set resamples=2 --labels={label} --guidance=1.5 --seed=5 "
            f"--out={tmp_path}/out.png --npz={tmp_path}/out.npz")  # fmt: skip
    assert main(line.split()) == 0
    with np.load(tmp_path / "out.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], shot.images)
    kind, again, known, painted, warning = studio.restored(shot.file)
    assert kind == "inpaint" and again == settings and warning == ""
    np.testing.assert_array_equal(known, image), np.testing.assert_array_equal(painted, fill)


def test_images_to_fill_in(studio):
    with pytest.raises(UserError, match="there are 0 to"):
        studio.held_out(10**6)
    file = io.BytesIO()
    Image.new("RGB", (40, 20), (255, 0, 0)).save(file, "JPEG")
    assert studio.uploaded(file.getvalue()).shape == (8, 8, 1)
    with pytest.raises(UserError, match="no picture"):
        studio.uploaded(b"text")
    settings, image = Settings("ddim", 2), np.zeros((8, 8, 1), np.uint8)
    with pytest.raises(UserError, match="no mask"):
        next(studio.inpaint(settings, image, np.zeros((8, 8), bool)))
    with pytest.raises(UserError, match="no image"):
        next(studio.inpaint(settings, None, np.ones((8, 8), bool)))


# Pictures with settings inside


def written(record):
    return png.encode(np.zeros((4, 4, 3), np.uint8), record)


def test_a_picture_of_another_model_is_loaded_with_a_warning(studio):
    settings = said.of_recipe(studio.model)
    record = studio.record("sample", settings)
    assert studio.restored(written(record))[1:] == (settings, None, None, "")
    record["model"]["crc32"] = "00000000"
    assert "another model" in studio.restored(written(record))[-1]


def other(studio, **fields):
    record = studio.record("inpaint", said.of_inpainting(studio.model))
    record |= {"image": png.pack(np.zeros((8, 8, 1), np.uint8)), "mask": png.pack(np.ones((8, 8), bool)), **fields}
    return json.loads(json.dumps(record))


BAD = [
    ({"settings": None}, "incomplete"),
    ({"settings": {"solver": "ddim"}}, "incomplete"),
    ({"kind": "video"}, "'video'"),
    ({"model": 3}, "unknown"),
    ({"image": png.pack(np.zeros((9, 8, 1), np.uint8))}, "8x9, and this model's images are 8x8"),
    ({"image": png.pack(np.zeros((8, 8, 3), np.uint8))}, "3 channels"),
    ({"mask": "not base64"}, "not one for this model"),
    ({"mask": None}, "not one for this model"),
]


@pytest.mark.parametrize("fields, what", BAD, ids=[str(next(iter(f.items())))[:40] for f, _ in BAD])
def test_a_picture_with_other_settings_inside_is_refused(studio, fields, what):
    with pytest.raises(UserError, match=what):
        studio.restored(written(other(studio, **fields)))


def test_settings_that_the_model_cannot_draw_are_refused(studio):
    record = studio.record("sample", dataclasses.replace(said.of_recipe(studio.model), labels=(3, 41)))
    with pytest.raises(UserError, match="label 41: the classes are 0 to 9"):
        studio.restored(written(record))
    record["settings"]["labels"], record["settings"]["steps"] = [3], "many"
    with pytest.raises(UserError, match="steps=many"):
        studio.restored(written(record))


def test_a_file_without_settings_is_refused(studio):
    jpeg, plain, text = io.BytesIO(), png.encode(np.zeros((4, 4, 3), np.uint8)), io.BytesIO()
    Image.new("L", (4, 4)).save(jpeg, "JPEG")
    for file in (b"", b"text", jpeg.getvalue(), plain[:30]):
        with pytest.raises(UserError, match="no PNG"):
            studio.restored(file)
    with pytest.raises(UserError, match="no settings"):
        studio.restored(plain)
    info = PngImagePlugin.PngInfo()
    info.add_text(png.KEY, "{" * 10000)
    Image.new("L", (4, 4)).save(text, "PNG", pnginfo=info)
    with pytest.raises(UserError, match="cannot be read"):
        studio.restored(text.getvalue())


def test_the_settings_are_plain_text_in_the_file(studio):
    file = last(studio.sample(Settings("ddim", 2, labels=(1,)))).file
    assert b"tEXtjax-diffusion\0{" in file


# The command


def test_a_page_that_names_other_hosts_is_served_without_them():
    page = b'<link rel="preconnect" href="https://a.b" /><link href="/own.css"><script src="//b.example/x"></script>'

    async def app(scope, receive, send):
        assert b"accept-encoding" not in dict(scope["headers"])
        headers = [(b"content-type", b"text/html"), (b"content-length", str(len(page)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in (page[:30], page[30:]):
            await send({"type": "http.response.body", "body": part, "more_body": part == page[:30]})

    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(server.Local(app)({"type": "http", "headers": [(b"accept-encoding", b"br")]}, None, send))
    start, body = sent
    assert body["body"] == b'<link href="/own.css">'
    assert dict(start["headers"])[b"content-length"] == b"22"
    assert b"default-src 'self'" in dict(start["headers"])[b"content-security-policy"]


def refused(capsys, *arguments):
    assert main(["studio", *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("jax-diffusion: error: ") and err.count("\n") == 1 and out == ""
    return err


def test_what_it_cannot_show_is_one_line(run, tmp_path, capsys, monkeypatch):
    pytest.importorskip("gradio", reason='pip install "jax_diffusion[studio]"')
    assert "jax-diffusion train" in refused(capsys, f"--workdir={tmp_path}", "--port=0")
    facts = json.loads((run.workdir / "dataset.json").read_text())
    config = json.loads((run.workdir / "config.json").read_text())
    conditioned = {**config, "condition": {"name": "low_resolution", "factor": 2}}
    kinds = (([2], config, "model of points"), ([8, 8, 4], config, "4 channels"),
             ([8, 8, 1], conditioned, "jax-diffusion upscale"))  # fmt: skip
    for shape, fields, what in kinds:
        (tmp_path / "config.json").write_text(json.dumps(fields))
        (tmp_path / "dataset.json").write_text(json.dumps({**facts, "shape": shape}))
        assert what in refused(capsys, f"--workdir={tmp_path}", "--port=0")
    with socket.create_server((server.HOST, 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port={port}: address already in use" in refused(capsys, f"--workdir={run.workdir}", f"--port={port}")
    assert "--port=70000" in refused(capsys, f"--workdir={run.workdir}", "--port=70000")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert 'pip install "jax_diffusion[studio]"' in refused(capsys, f"--workdir={run.workdir}")


def test_a_run_without_classes_has_no_labels_and_no_guidance(run, tmp_path):
    """The network of a run without labels, untrained: its fields are read, and it draws."""
    model = models.load(run.workdir)
    bare = dataclasses.replace(model, class_names=())
    fields = said.show(said.of_recipe(bare), ())
    settings = said.read(bare, {**fields, "guidance": None, "labels": None})
    assert settings.labels is None and settings.scale == 1.0
    assert "--guidance" not in settings.command("w", 1, 0) and "--labels" not in settings.command("w", 1, 0)
