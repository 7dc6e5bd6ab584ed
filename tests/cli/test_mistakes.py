"""Every mistake a user makes ends in one line that names the option, its value and the remedy, and in status 2."""

import pytest

from jax_diffusion.cli.main import main

TRAIN = ["train", "--config=digits", "--workdir={new}"]
SAMPLE = ["sample", "--workdir={run}"]
COMMANDS = ("train", "sample", "evaluate", "optimize")
OPTIMIZE = ["optimize", "--workdir={run}"]
EVALUATE = ["evaluate", "--workdir={run}"]

MISTAKES = [
    # arguments, what the line says
    (["trian"], ["trian", "train"]),
    (["train", "--config=digits"], ["--workdir"]),
    (["train", "--workdir={new}"], ["--workdir={new}", "--config=digits"]),
    (["train", "--config=digitz", "--workdir={new}"], ["--config='digitz'", "did you mean 'digits'?"]),
    (["train", "--config={new}.py", "--workdir={new}"], ["--config={new}.py", "no such file"]),
    (["train", "--config=digits", "--workdir=/dev/null/run"], ["/dev/null/run", "Not a directory"]),
    ([*SAMPLE, "--npz=/dev/null/samples.npz"], ["/dev/null", "File exists"]),
    ([*TRAIN, "--stop_at=soon"], ["--stop_at", "'soon'"]),
    ([*TRAIN, "--stop_at=0"], ["--stop_at=0", "at least 1"]),
    ([*TRAIN, "--steps=5"], ["--steps=5", "--config.train.steps=100"]),
    ([*TRAIN, "--config.train.stpes=5"], ["--config.train.stpes", "did you mean 'steps'?"]),
    ([*TRAIN, "--config.train.steps=five"], ["--config.train.steps='five'", "int"]),
    ([*TRAIN, "--config.train.steps=0"], ["--config.train.steps=0", "at least 1"]),
    ([*TRAIN, "--config.train.accumulate=3"], ["batch_size=64", "3 accumulation steps", "multiple of 3"]),
    ([*TRAIN, "--config.mesh.data=3"], ["mesh.data=3", "1 devices", "-1"]),
    ([*TRAIN, "--config.optim.warmup=5000"], ["optim.warmup=5000", "train.steps=2000"]),
    ([*TRAIN, "--config.optim.schedule=cosin"], ["'cosin'", "did you mean 'cosine'?"]),
    ([*TRAIN, "--config.model.multipliers=1,2,2,2,2"], ["8x8", "16", "model.multipliers"]),
    ([*TRAIN, "--config.model.heads=7"], ["model.heads=7", "channels"]),
    ([*TRAIN, "--config.data.source=digit"], ["'digit'", "did you mean 'digits'?"]),
    ([*TRAIN, "--config.process.schedule=cosin"], ["'cosin'", "did you mean 'cosine'?"]),
    ([*TRAIN, "--config.process.prediction=eps"], ["'eps'", "epsilon"]),
    ([*TRAIN, "--config.process.weighting=min_srn"], ["'min_srn'", "did you mean 'min_snr'?"]),
    ([*TRAIN, "--config.process.timesteps=unifrom"], ["'unifrom'", "did you mean 'uniform'?"]),
    ([*TRAIN, "--config.sampling.solver=dimm"], ["'dimm'", "did you mean 'ddim'?"]),
    (["train", "--workdir={run}", "--config.seed=1"], ["seed: 0 -> 1", "another config", "another workdir"]),
    (
        ["train", "--workdir={run}", "--config=digits"],
        ["--workdir={run}", "model.channels: 16 -> 32", "another workdir"],
    ),
    (["sample", "--workdir={new}"], ["--workdir={new}", "jax-diffusion train"]),
    (["sample", "--workdir={empty}"], ["--workdir={empty}", "no checkpoint", "jax-diffusion train"]),
    ([*SAMPLE, "--solver=ddmi"], ["'ddmi'", "did you mean 'ddim'?"]),
    ([*SAMPLE, "--steps=0"], ["steps=0", "at least 1"]),
    ([*SAMPLE, "--steps=2000"], ["steps=2000", "at most 1000"]),
    ([*SAMPLE, "--steps=ten"], ["--steps", "'ten'"]),
    ([*SAMPLE, "--grid=laeding"], ["'laeding'", "did you mean 'leading'?"]),
    ([*SAMPLE, "--set", "eta"], ["--set eta", "--set eta=0.5"]),
    ([*SAMPLE, "--solver=ddim", "--set", "etta=1"], ["'etta'", "did you mean 'eta'?"]),
    ([*SAMPLE, "--solver=ddim", "--set", "eta=big"], ["eta", "big"]),
    ([*SAMPLE, "--solver=ddpm", "--set", "variance=fixed_smal"], ["'fixed_smal'", "did you mean 'fixed_small'?"]),
    ([*SAMPLE, "--set", "final=end"], ["'end'", "zero"]),
    ([*SAMPLE, "--grid=karras", "--set", "rho=many"], ["rho", "many"]),
    ([*SAMPLE, "--labels=3,cat"], ["--labels=3,cat", "'cat'", "0 to 9"]),
    ([*SAMPLE, "--labels=10"], ["--labels=10", "0 to 9"]),
    ([*SAMPLE, "--num=0"], ["--num=0", "at least 1"]),
    ([*SAMPLE, "--batch_size=-1"], ["--batch_size=-1", "at least 1"]),
    ([*SAMPLE, "--seed=x"], ["--seed", "'x'"]),
    ([*SAMPLE, "--checkpoint=7"], ["--checkpoint=7", "30, 60"]),
    ([*SAMPLE, "--labels=none", "--guidance=2"], ["--guidance=2", "unconditional"]),
    ([*SAMPLE, "--guidance=two"], ["--guidance", "'two'"]),
    ([*SAMPLE, "--num=2", "--guidance=2,3,4"], ["3", "2 samples"]),
    ([*SAMPLE, "--guidance=1", "--guidance_rescale=0.7"], ["--guidance_rescale", "--guidance=2"]),
    ([*SAMPLE, "--guidance=2", "--guidance_rescale=7"], ["rescale 7", "[0, 1]"]),
    ([*SAMPLE, "--guidance=2", "--guidance_interval=3"], ["--guidance_interval", "2 numbers", "'3'"]),
    ([*SAMPLE, "--guidance=2", "--guidance_interval=3,1"], ["3,1", "LO < HI"]),
    ([*SAMPLE, "--guidance=2", "--apg=0,-1"], ["radius -1", "inf"]),
    ([*SAMPLE, "--guidance=2", "--negative=11"], ["11", "0 to 9"]),
    ([*SAMPLE, "--guidance=2", "--autoguide={new}"], ["--autoguide={new}", "jax-diffusion train"]),
    ([*SAMPLE, "--guidance=2", "--autoguide={run}:7"], ["--autoguide={run}:7", "30, 60"]),
    ([*SAMPLE, "--guidance=2", "--autoguide={run}:30", "--negative=1"], ["--negative=1", "one of the two"]),
    ([*SAMPLE, "--threshold=0"], ["threshold=0", "99.5"]),
    ([*SAMPLE, "--table={new}.npz"], ["{new}.npz", "jax-diffusion optimize"]),
    ([*SAMPLE, "--table={new}.npz", "--steps=3"], ["--table={new}.npz", "--steps"]),
    ([*OPTIMIZE, "--out={new}.txt"], ["--out={new}.txt", ".npz"]),
    ([*OPTIMIZE, "--iterations=0"], ["--iterations=0", "at least 1"]),
    ([*OPTIMIZE, "--solver=ddpm", "--steps=3"], ["ddpm", "adds noise"]),
    ([*OPTIMIZE, "--solver=predictor_corrector", "--steps=3"], ["predictor_corrector", "no table", "unipc"]),
    ([*OPTIMIZE, "--reference=ddmi"], ["'ddmi'", "did you mean 'ddim'?"]),
    ([*OPTIMIZE, "--reference_steps=4", "--memory=1"], ["--memory=1", "2 predictions"]),
    ([*SAMPLE, "--nmu=3"], ["--nmu=3", "sample --help"]),
    ([*SAMPLE, "--out={folder}"], ["--out={folder} is a folder", "samples.png"]),
    ([*SAMPLE, "--out={new}.wrong"], ["--out={new}.wrong", ".png"]),
    ([*SAMPLE, "--trajectory={new}"], ["--trajectory={new}", ".gif"]),
    ([*EVALUATE, "--metrics=acuracy"], ["'acuracy'", "did you mean 'accuracy'?"]),
    ([*EVALUATE, "--num=1"], ["--num=1", "at least 2"]),
    ([*EVALUATE, "--batch_size=0"], ["--batch_size=0"]),
    (["evaluate", "--workdir={new}"], ["--workdir={new}", "jax-diffusion train"]),
]


@pytest.fixture(scope="module")
def places(run, tmp_path_factory):
    """Names for paths: a trained run, one without checkpoints, a folder, and something that is not there."""
    root = tmp_path_factory.mktemp("places")
    empty = root / "empty"
    empty.mkdir()
    for name in ("config.json", "dataset.json"):
        (empty / name).write_bytes((run.workdir / name).read_bytes())
    return {"run": run.workdir, "empty": empty, "folder": root, "new": root / "new"}


@pytest.mark.parametrize("typed, words", MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_a_mistake_is_one_line(typed, words, places, capsys):
    status = main([a.format(**places) for a in typed])
    out, err = capsys.readouterr()
    assert status == 2
    assert out == "" or "train" in typed
    assert err.startswith("jax-diffusion: error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert all(w.format(**places) in err for w in words), err


def test_nothing_is_written_by_a_mistake(places):
    assert not places["new"].exists()


@pytest.mark.parametrize("typed", [["--help"], *([c, "--help"] for c in COMMANDS)])
def test_help(typed, capsys):
    with pytest.raises(SystemExit) as done:
        main(typed)
    assert done.value.code == 0 and "usage: jax-diffusion" in capsys.readouterr().out


def test_version(capsys):
    import jax_diffusion

    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == jax_diffusion.__version__
