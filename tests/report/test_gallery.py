"""Hostile texts in the gallery, against a Markdown parser of its own (markdown-it, GitHub dialect)."""

import re

import pytest
from markdown_it import MarkdownIt

from stages.lib.report.gallery import as_markdown
from stages.lib.report.untrusted_text import escape_markdown

HOSTILE = [
    "a | b || c",
    "first line\nsecond line\r\n\r\nlast",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "**bold** _it_ ~~gone~~ `code` $x^2$ \\| \\",
    "[click](javascript:alert(1)) ![x](http://evil.example/x.png)",
    "http://evil.example www.evil.example @someone #1 :smile: a@b.example",
    "# heading\n- list\n1. one\n> quote\n---\n| a | b |\n|---|---|",
    "&lt;b&gt; &#42; &amp;",
    "`` ` `` ``` \n```\ncode",
    "| greedy |",
    "",
    "\u202eevil\x00\x1b[31m",
]


def sample(text):
    models = ("base", "dpo", "ppo")
    return {
        "prompt": text,
        "prompt_id": None,
        "answers": {model: {"greedy": text, "sampled": text} for model in models},
        "ended": {model: {"greedy": True, "sampled": False} for model in models},
    }


def parser():
    # raw HTML off: our own <br> then shows as text and can be told from anything else
    return MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])


def text_of(tokens):
    """The text a reader sees, and the kinds of all inline tokens."""
    kinds, text = set(), ""
    for token in tokens:
        for child in token.children or []:
            kinds.add(child.type)
            text += child.content
    return text, kinds


def quote_of(tokens):
    """The lines that a reader sees of the first block quote."""
    start, end = (
        next(i for i, t in enumerate(tokens) if t.type == f"blockquote_{what}") for what in ("open", "close")
    )
    lines = []
    for token in (t for t in tokens[start:end] if t.type == "inline"):
        assert {child.type for child in token.children} <= {
            "text",
            "text_special",
            "hardbreak",
            "em_open",
            "em_close",
        }
        text = "".join("\n" if child.type == "hardbreak" else child.content for child in token.children)
        lines += [" ".join(line.split()) for line in text.split("\n")]
    return lines


def visible(text):
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "<br>")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", "\ufffd", text).strip()


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_as_written(text):
    tokens = parser().parse(as_markdown([sample(text), sample("plain")]))
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1", "h2", "h2"]
    assert sum(token.type == "blockquote_open" for token in tokens) == 2 * 2 * 3
    allowed = {"heading", "paragraph", "blockquote"}
    assert {token.type.rsplit("_", 1)[0] for token in tokens if token.type != "inline"} <= allowed
    quote = quote_of(tokens)
    lines = [" ".join(line.split()) for line in visible(text).split("<br>")]
    assert [line for line in quote if line] == [line for line in lines if line] or (text, quote) == (
        "",
        ["(nothing)"],
    )

    seen, kinds = text_of(parser().parseInline("x " + escape_markdown(text) + " x"))
    assert kinds <= {"text", "text_special"}
    assert re.sub(r"\s+", " ", seen) == re.sub(r"\s+", " ", f"x {visible(text)} x")


def test_answers_can_be_read_without_rendering():
    lines = as_markdown([sample("One line.\nAnother.\n\nA new paragraph.")]).splitlines()
    place = lines.index("**Base, sampled**")
    assert lines[place : place + 6] == [
        "**Base, sampled**", "", "> One line.\\", "> Another.", ">", "> A new paragraph. […]"
    ]  # fmt: skip
    assert not any("|" in line or "<br>" in line for line in lines if line.startswith(">"))


def test_an_answer_cut_at_the_limit_is_marked_and_an_empty_one_said():
    text = as_markdown([sample("")])
    assert text.count("*(nothing)*") == 6
    assert text.count("[…]") == 1 + 3  # the legend and the three sampled answers
