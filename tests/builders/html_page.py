"""A parser for HTML pages, and a check that a page is self-contained."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """Collects the tags of a page with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def assert_self_contained(html: str) -> None:
    """Asserts that a page has no script, no external reference, and no broken internal one."""
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert not re.findall(r"https?:|@import", html)
    targets = re.findall(r"url\(([^)]*)\)", html)
    targets += [str(value) for _, some in page.tags for key, value in some.items() if "href" in key]
    assert targets
    assert all(target.startswith("#") for target in targets)
    sources = [str(image["src"]) for image in page.named("img")]
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names))
    assert {target[1:] for target in targets} <= set(names)
