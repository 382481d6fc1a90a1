"""Cards as the Hub shows them, and texts that would like to act there."""

import re
from html.parser import HTMLParser
from typing import Any

import yaml
from markdown_it import MarkdownIt

HOSTILE = [
    "<script>alert(1)</script>", "[click](javascript:alert(1))", "![x](https://evil.example/x.png)", "a | b | c",
    "`code` **bold** _em_ ~~gone~~", "x --- y: [&a *a, !!python/object:os.system {}]", "<!-- hidden", "\\<b>", "|",
    "https://evil.example www.evil.example", "@someone me@evil.example #1 :smile:", "&lt;b&gt; &#60;b&#62;", "\\",
    "</td></table><h1>big", "'\"; license: mit #", "- list", "# head", "{{ jinja }} ${x}", "\u202etxt.exe", "---",
    "x\x1b]0;title\x07y", "a\n---\nlicense: mit\n---\n# owned", "a\u2028# owned",
]  # fmt: skip
_LANGUAGES = [("class", "language-sh"), ("class", "language-python")]
TAGS = {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "code", "pre"}


class Rendered(HTMLParser):
    """Tags, attributes and text of a rendered card."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[Any] = []
        self.cells: list[str] = []
        renderer = MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough")
        self.feed(renderer.render(text))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += [pair for pair in attrs if pair not in _LANGUAGES]
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells and self.tags[-1] == "td":
            self.cells[-1] = (self.cells[-1] + data).rstrip("\n")  # lines end between cells too

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


def parts(card: str) -> tuple[Any, str]:
    """Front matter as the Hub finds it, and the rest."""
    match = re.match(r"\A---\n(.*?)\n---\n", card, re.DOTALL)
    assert match
    return yaml.safe_load(match[1]), card[match.end() :]
