"""The page as HTML: the template around its parts.

Prompts and answers are untrusted text. They reach the page only as values of an autoescaping template, which
has no scripts and whose content policy forbids them, as it forbids any request to another place.
"""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stages.lib.report.page import Page


def render(page: Page) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(page=page)
