"""`jd.solvers.make` in a page is a link to its place in the reference."""

import re

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.transforms.post_transforms import SphinxPostTransform

NAME = re.compile(r"^(?:jd|jax_diffusion)((?:\.\w+)+)(\(.*\))?$", re.S)


class CodeLinks(SphinxPostTransform):
    default_priority = 5  # before references are resolved

    def run(self, **_):
        for literal in list(self.document.findall(nodes.literal)):
            found = NAME.match(literal.astext())
            if found is None or isinstance(literal.parent, nodes.reference | pending_xref):
                continue
            link = pending_xref(
                "", refdomain="py", reftype="obj", reftarget="jax_diffusion" + found[1], refexplicit=True,
                refwarn=False, refdoc=self.env.docname,
            )  # fmt: skip
            literal.replace_self(link)
            link += literal


def elsewhere(app, env, node, content):
    """What a package hands on is in the reference under the package: solvers.table.Table as solvers.Table."""
    path = node.get("reftarget", "").split(".")
    if node.get("refdomain") != "py" or path[0] != "jax_diffusion" or len(path) < 4:
        return None
    target = ".".join([*path[:-2], path[-1]])
    return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, node["reftype"], target, node, content)


def setup(app):
    app.add_post_transform(CodeLinks)
    app.connect("missing-reference", elsewhere)
    return {"parallel_read_safe": True}
