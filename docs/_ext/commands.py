"""`{commands}`: a section for each command of jax-diffusion, with what its --help prints."""

import argparse
import os

from docutils import nodes
from docutils.parsers.rst import Directive


class Commands(Directive):
    def run(self):
        os.environ["COLUMNS"] = "100"  # argparse's width
        from jax_diffusion.cli import main

        made = [a for a in main._parser()._actions if isinstance(a, argparse._SubParsersAction)]
        sections = []
        for name, parser in made[0].choices.items():
            section = nodes.section(names=[f"jax-diffusion {name}"])
            section += nodes.title("", name)
            section += nodes.literal_block("", parser.format_help(), language="text")
            self.state.document.note_implicit_target(section, section)
            sections.append(section)
        return sections


def setup(app):
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True}
