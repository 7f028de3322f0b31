"""Text that data or a model wrote, made harmless for Markdown and HTML without changing what a reader sees."""

import re
import unicodedata

# HTML's own characters, and what Markdown, its dialects' links, mentions and shortcodes, and KaTeX read as marks.
# Quotes are left alone: the text may stand in an element, never in an attribute.
_MARKS = re.compile(r"[&<>`*_\[\]|~$#@\\]|:(?=//|[\w+-]+:)|(?<=www)\.", re.IGNORECASE)
_BEGINNING = re.compile(
    r"\s*(?:[-+=]+|\d+[.)](?=\s|$))|[ \t]+"
)  # a list, a rule, an underline or code, where a line begins
_SEPARATORS = "\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"  # line breaks, directions


def without_controls(text: str) -> str:
    """With U+FFFD for every control character, lone surrogate and direction override; line breaks as \\n."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return "".join("\ufffd" if _is_bad(character) else character for character in text)


def escape_markdown(text: str) -> str:
    """One line, of Markdown or inside an HTML block, that shows `text` as it was written.

    Marks become character references, which Markdown never reads as structure; line breaks become <br>.
    """
    text = without_controls(text)
    beginning = match.group() if (match := _BEGINNING.match(text)) else ""
    rest = _MARKS.sub(lambda found: _references(found.group()), text[len(beginning) :])
    return (_references(beginning) + rest).replace("\n", "<br>")


def _references(text: str) -> str:
    return "".join(f"&#{ord(character)};" if character != "\n" else "\n" for character in text)


def _is_bad(character: str) -> bool:
    unprintable = unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
    return unprintable or character in _SEPARATORS
