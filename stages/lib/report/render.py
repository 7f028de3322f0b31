"""The pages as HTML: a template around the parts of each.

Prompts and answers are untrusted text. They reach the page only as values of an autoescaping template, which
has no scripts and whose content policy forbids them, as it forbids any request to another place.
"""

from pathlib import Path

from stages.lib.report.data_page import DataPage
from stages.lib.report.page import Page
from stages.lib.run.templates import environment


def render(page: Page) -> str:
    """The report as HTML."""
    return environment(Path(__file__).parent).get_template("page.html.jinja").render(page=page)


def render_data(page: DataPage) -> str:
    """The look at the pairs as HTML."""
    return environment(Path(__file__).parent).get_template("data.html.jinja").render(page=page)
