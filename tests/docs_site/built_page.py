"""What a built page holds, read with the standard library."""

import html.parser
import pathlib
import urllib.parse

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "embed": "src", "object": "data",
           "audio": "src", "video": "src", "use": "href", "image": "href"}  # fmt: skip


class Page(html.parser.HTMLParser):
    """ids; links: (href) of <a>; fetched: what a browser loads by itself; nav: links within the site's menu."""

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self.path = path
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.nav: list[str] = []
        self._menu = 0  # open tags since the menu's
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        if "id" in a:
            self.ids.add(a["id"])
        if tag == "a" and "name" in a:
            self.ids.add(a["name"])
        if tag == "a" and a.get("href"):
            (self.nav if self._menu else self.links).append(a["href"])
        if tag == "link" and a.get("rel") not in ("canonical", "author", "license"):
            self.links.append(a["href"]) if a["rel"] in ("next", "prev", "index", "search") else self.fetched.append(
                a["href"]
            )
        if a.get(FETCHED.get(tag, "-")):
            self.fetched.append(a[FETCHED[tag]])
        if "srcset" in a:
            self.fetched += [part.split()[0] for part in a["srcset"].split(",")]
        if self._menu:
            self._menu += tag not in VOID
        elif "sidebar-tree" in a.get("class", "").split():
            self._menu = 1

    def handle_endtag(self, tag):
        if self._menu and tag not in VOID:
            self._menu -= 1


def is_external(link: str) -> bool:
    return bool(urllib.parse.urlsplit(link).scheme) or link.startswith("//")


def resolve(page: pathlib.Path, link: str) -> tuple[pathlib.Path, str]:
    """The file and the id that a relative link of a page leads to."""
    parts = urllib.parse.urlsplit(link)
    path = urllib.parse.unquote(parts.path)
    return (page.parent / path).resolve() if path else page.resolve(), urllib.parse.unquote(parts.fragment)
