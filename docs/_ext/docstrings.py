"""The docstrings of this project, which are plain prose, as reStructuredText.

What is indented stays as it is (equations, tables), `this` is code, "name: what it is" with its further lines indented
is a parameter, Args:, Returns: and Raises: are their lists. A field without a docstring is described by the comment
behind it in the source.
"""

import inspect
import re
from types import FunctionType

ENTRY = re.compile(r"^([A-Za-z_*]\w*(?:, [A-Za-z_]\w*)*)(\([^)]*\)(?: -> [^:]+)?)?:\s+(\S.*)$")
SECTIONS = {"Args:": None, "Returns:": ":returns: ", "Raises:": ":raises "}


def inline(text: str) -> str:
    """One line of prose: `code` is code, and nothing else is markup."""
    out = []
    for i, part in enumerate(re.split(r"`([^`\n]+)`", text)):
        if i % 2:
            out.append(f"``{part}``\\ " if part == part.strip() else part)
        else:
            # *this* is meant; any other star, bar or underscore is itself.
            words = re.split(r"(?<!\S)(\*\w[\w -]*\*)(?=[\s.,;:)]|$)", part)
            words[::2] = [re.sub(r"([*|\\]|_(?!\w))", r"\\\1", w).replace("`", r"\`") for w in words[::2]]
            out += words
    return re.sub(r"``\\ (?=[\s.,;:)]|$)", "``", "".join(out))


def blocks(lines: list[str]) -> list[list[str]]:
    """Runs of lines: parted by blank lines, and where an indented run after a blank line begins or ends."""
    found, current = [], []
    for line in [*lines, ""]:
        if line.strip():
            current.append(line)
        elif current:
            if found and current[0][0] == " " and found[-1][0][0] == " ":
                found[-1] += ["", *current]  # one drawing with a gap in it
            else:
                found.append(current)
            current = []
    return found


def dedent(lines: list[str]) -> list[str]:
    return inspect.cleandoc("\n" + "\n".join(lines)).splitlines()


def paragraph(lines: list[str], parameters: bool) -> list[str]:
    """Prose, with the entries and list items that it may hold."""
    out, kind = [], ""
    for line in lines:
        entry = ENTRY.match(line)
        if line.startswith("- "):
            out += ["", "- " + inline(line[2:])] if kind != "item" else ["- " + inline(line[2:])]
            kind = "item"
        elif entry:
            names, call, text = entry.groups()
            if parameters and not call:
                out += ["", *(f":param {name}: {inline(text)}" for name in names.replace("*", r"\*").split(", "))]
            else:
                out += ["", f"``{names}{call or ''}``", f"    {inline(text)}"]
            kind = "entry" if parameters and not call else "term"
        elif kind in ("item", "entry", "term") and line.startswith(" "):
            out.append(("    " if kind != "item" else "  ") + inline(line.strip()))
        elif kind == "prose":
            out[-1] += " " + inline(line.strip())
        else:
            out += ["", inline(line.strip())]
            kind = "prose"
    return [*out, ""]


def section(head: str, body: list[str]) -> list[str]:
    if head == "Args:":
        return paragraph(body, parameters=True)
    text = " ".join(line.strip() for line in body)
    if head == "Raises:":
        out = []
        for line in body:
            name, colon, rest = line.partition(": ")
            if colon and re.fullmatch(r"\w+", name):
                out.append(f":raises {name}: {inline(rest)}")
            else:
                out[-1:] = [f"{out[-1] if out else ':raises:'} {inline(line.strip())}"]
        return ["", *out, ""]
    return ["", f":returns: {inline(text)}", ""]


def convert(lines: list[str], parameters: bool = False) -> list[str]:
    """The reStructuredText of a docstring's lines. parameters: whether its entries are those of a call."""
    out = []
    for block in blocks(lines):
        if block[0].startswith(">>>"):
            out += ["", ".. code-block:: pycon", "", *("    " + line for line in block), ""]
        elif block[0].strip() in SECTIONS and len(block) > 1 and not block[0].startswith(" "):
            out += section(block[0].strip(), dedent(block[1:]))
        elif block[0].startswith(" "):
            out += ["", "::", "", *("    " + line for line in dedent(block)), ""]
        else:
            out += paragraph(block, parameters)
    return out


def comments(cls: type) -> dict[str, str]:
    """{field: the comment behind it} of a class of fields."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return {}
    return dict(re.findall(r"^    (\w+): [^#\n]*?#\s*(.+)$", source, re.M))


def members(registry: dict) -> list[str]:
    """The names in a registry, each a link to what it makes."""
    named = []
    for name, value in registry.items():
        known = isinstance(value, FunctionType | type) and "<" not in value.__qualname__
        named.append(f":py:obj:`{name} <{value.__module__}.{value.__qualname__}>`" if known else f"``{name}``")
    return ["", "By name: " + ", ".join(named) + ".", ""]


def process(app, what, name, obj, options, lines) -> None:
    if what in ("attribute", "property") and (not lines or lines[0].startswith("Alias for field number")):
        owner, _, field = name.rpartition(".")
        cls = _find(owner)
        text = comments(cls).get(field, "") if cls else ""
        lines[:] = [inline(text)] if text else []
    elif what == "data" and isinstance(obj, dict):
        lines[:] = members(obj) if all(callable(value) for value in obj.values()) else []
    else:
        lines[:] = convert(list(lines), parameters=what in ("function", "method", "class"))


def _find(name: str):
    module, _, cls = name.rpartition(".")
    found = getattr(__import__(module, fromlist=["_"]), cls, None) if module else None
    return found if isinstance(found, type) else None


def setup(app):
    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True}
