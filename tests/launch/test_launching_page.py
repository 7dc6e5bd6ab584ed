"""docs/launching.md: what it shows of --dry-run is what the scripts print, with the settings it has exported."""

import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).parents[2]


def shown():
    """Of each `$ launch/... --dry-run ...`: the exports of its section before it, the command, the lines below it."""
    for section in (ROOT / "docs/launching.md").read_text().split("\n## "):
        settings = {}
        for block in re.findall(r"```console\n(.*?)```", section, re.S):
            for command, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.M):
                words = shlex.split(command, comments=True)
                if words[0] == "export":
                    settings |= dict(word.split("=", 1) for word in words[1:])
                if "--dry-run" in words:
                    yield dict(settings), words, output


def test_the_page_shows_what_the_scripts_print(fake):
    examples = list(shown())
    assert [words[0] for _, words, _ in examples] == ["launch/tpu_vm.sh"] * 2 + ["launch/slurm.sh"]
    for settings, words, output in examples:
        done = fake.run(words[0].removeprefix("launch/"), *words[1:], TPU_POLL="60", **settings)
        assert done.returncode == 0, done.stderr
        head, dots, _ = output.partition("...\n")
        assert done.stdout == output or (dots and done.stdout.startswith(head)), done.stdout


def test_every_script_and_setting_it_names_exists():
    text = (ROOT / "docs/launching.md").read_text()
    settings = re.findall(r"^([A-Z_]+)=", (ROOT / "launch/settings.env").read_text(), re.M)
    assert {*re.findall(r"\b(?:RUN|TPU|JOB|KUBE)_[A-Z_]+", text)} <= {*settings}
    for path in re.findall(r"\blaunch/[\w.]+\w", text):
        assert (ROOT / path).exists(), path
