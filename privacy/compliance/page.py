"""Self-contained HTML pages: templates, one inline style sheet, nothing from outside, no scripts.

What a page shows may come from somebody hostile (a bundle, a log, file names). So everything is escaped by
Jinja's autoescape, invisible and direction-changing characters are shown as U+FFFD, long texts are cut with
a note, and a content security policy in the page forbids scripts and every outside source besides.
"""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

MAX_TEXT_CHARACTERS = 4000
"""Longest text in a page's tables and sentences; the statements of the appendix have a bound of their own."""

CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Verbatim(str):
    """A long text that is shown whole (still escaped)."""

    __slots__ = ()


def render_page(template: str, *, package: str = "privacy.compliance", **context: Any) -> str:
    """Render a page.

    Args:
        template: File name in ``templates/`` of ``package``; it may extend this package's templates.
        context: Values for it; a missing one is an error, never an empty place.
    """
    environment = _environment(package)
    return environment.get_template(template).render(
        policy=CONTENT_SECURITY_POLICY, style=_style(), **context
    )


def visible(value: Any) -> Any:
    """Text as it can safely be read: no control or direction characters, bounded in length."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    shown = "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
        else "\ufffd"
        for character in value
    )
    if len(shown) > MAX_TEXT_CHARACTERS and not isinstance(value, Verbatim):
        cut = len(shown) - MAX_TEXT_CHARACTERS
        return f"{shown[:MAX_TEXT_CHARACTERS]} [{cut} more characters]"
    return shown


@cache
def _environment(package: str) -> Environment:
    return Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("privacy.compliance")]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _style() -> Markup:
    loader = PackageLoader("privacy.compliance")
    source, _, _ = loader.get_source(Environment(autoescape=True), "page.css")
    return Markup(source)  # noqa: S704 - our own file, no input in it
