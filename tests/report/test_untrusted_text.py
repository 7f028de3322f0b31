from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from stages.lib.report.untrusted_text import escape_markdown, without_controls

MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


class Page(HTMLParser):
    """The elements and the text of a page, line breaks as \\n."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.text += "\n" if tag == "br" else ""

    def handle_data(self, data):
        self.text += data


HOSTILE = [
    "</td></tr></table><script>alert(1)</script>",
    "| a | b |\n|---|---|\n",
    "# heading\n\n---\n\n- list\n1. one\n```\ncode\n```\n",
    "![x](http://evil) [y](javascript:alert) <img src=x onerror=alert(1)>",
    "*a* _b_ ~~c~~ `d` **e** \\( x \\) $$ \\frac{1}{2} $$",
    "&lt;b&gt; &amp;amp; &#42;",
    "www.example.com @somebody #12 :tada: https://example.com",
    "1. first",
    "=====",
    "    four spaces",
]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
@settings(max_examples=400, deadline=None)
@example("\n=")
def test_the_reader_sees_the_text_and_nothing_else_happens(text):
    for before, after, tags in (
        ("a ", " z", ["p"]),  # within a paragraph
        ("", "", ["p"]),  # as a paragraph
        ("| head |\n|---|\n| a ", " z |", ["table", "thead", "tr", "th", "tbody", "tr", "td"]),
        ("<table><tr><td>a ", " z</td></tr></table>", ["table", "tr", "td"]),
    ):
        page = Page(MARKDOWN.render(before + escape_markdown(text) + after))
        found = [tag for tag in page.tags if tag != "br"]
        assert found == tags or (not before and found == [])  # a lone line break makes no paragraph
        assert "".join(without_controls(text).split()) in "".join(page.text.split())


@pytest.mark.parametrize("text", HOSTILE)
def test_known_attacks_stay_text(text):
    page = Page(MARKDOWN.render("a " + escape_markdown(text) + " z"))
    assert set(page.tags) <= {"p", "br"}
    assert "".join(text.split()) in "".join(page.text.split())
    assert "$" not in escape_markdown(text) and "\\" not in escape_markdown(
        text
    )  # KaTeX reads before Markdown does


def test_what_no_page_should_carry_becomes_a_replacement_character():
    assert without_controls("a\x00b\x1bc\u202ed\ud800e\u2028f") == "a\ufffdb\ufffdc\ufffdd\ufffde\ufffdf"
    assert without_controls("a\r\nb\rc\td") == "a\nb\nc\td"


def test_everyday_text_is_left_alone():
    text = "Oh, it's 7:30 - \"early\", isn't it? 😄 🫨 Ça va!"
    assert escape_markdown(text) == text
