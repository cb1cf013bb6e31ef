"""What mkdocs does beside its plugins (`hooks` in mkdocs.yml)."""

from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """Drops the `::` that stands before a drawing in a docstring; Markdown needs none."""
    return html.replace("<p>::</p>\n", "")
