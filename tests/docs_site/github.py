"""Markdown's links as GitHub reads them."""

import pathlib
import re
import urllib.parse

FENCE = re.compile(r"^(\s*)(`{3,}|~{3,}).*?^\1\2\s*$", re.M | re.S)


def prose(text: str) -> str:
    """Without fenced and inline code and without comments."""
    text = re.sub(r"<!--.*?-->", "", FENCE.sub("", text), flags=re.S)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "code", text, flags=re.S)


def links(text: str) -> list[str]:
    """Targets of links and images."""
    return re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", prose(text))


def anchors(text: str) -> set[str]:
    """The ids that GitHub gives to headings: lower case, no punctuation, - for blanks; -1, -2 for equal ones."""
    found: set[str] = set()
    for title in re.findall(r"^#{1,6}\s+(.+?)\s*#*\s*$", FENCE.sub("", text), re.M):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        name, n = slug, 0
        while name in found:
            n += 1
            name = f"{slug}-{n}"
        found.add(name)
    return found


def dead(page: pathlib.Path, root: pathlib.Path) -> list[str]:
    """The page's relative links that lead nowhere, or out of the repository."""
    out = []
    for link in links(page.read_text()):
        parts = urllib.parse.urlsplit(link)
        if parts.scheme or link.startswith("//"):
            continue
        target = (page.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else page
        there = target.exists() and target.is_relative_to(root)
        if there and parts.fragment:
            there = target.suffix == ".md" and parts.fragment in anchors(target.read_text())
        if not there:
            out.append(link)
    return out
