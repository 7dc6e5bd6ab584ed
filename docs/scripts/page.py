"""Generated parts of a Markdown page, between `<!-- NAME -->` and `<!-- end NAME -->`."""

import pathlib
import re


def insert(path: str, name: str, text: str) -> None:
    """Replaces what stands between the two comments of that name in the page."""
    page = pathlib.Path(path)
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.S)
    new, found = pattern.subn(lambda m: f"{m[1]}\n{text.strip()}\n\n{m[2]}", page.read_text())
    if found != 1:
        raise SystemExit(f"{path} should have the comments <!-- {name} --> and <!-- end {name} --> once, has {found}")
    page.write_text(new)
