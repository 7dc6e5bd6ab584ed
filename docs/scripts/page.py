"""Generated parts of a Markdown page, between `<!-- NAME -->` and `<!-- end NAME -->`."""

import pathlib
import re


def _parts(path: str, name: str) -> tuple[str, str, str]:
    """The page up to the first comment, between the two, and from the second on."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
    found = re.fullmatch(f"(.*{begin})(.*)({end}.*)", pathlib.Path(path).read_text(), re.S)
    if found is None or found[1].count(begin) != 1 or found[3].count(end) != 1:
        raise SystemExit(f"{path} should have the comments {begin.strip()} and {end} once each")
    return found[1], found[2], found[3]


def part(path: str, name: str) -> str:
    """What stands between the two comments of that name in the page."""
    return _parts(path, name)[1].strip()


def insert(path: str, name: str, text: str) -> None:
    """Replaces that."""
    before, _, after = _parts(path, name)
    pathlib.Path(path).write_text(f"{before}\n{text.strip()}\n\n{after}")
