"""What mkdocs does beside its plugins (`hooks` in mkdocs.yml)."""

import pathlib
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHOWN = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Shows files of the top level as pages, with their links as the site has them."""
    if page.file.src_uri not in SHOWN:
        return markdown
    text = (ROOT / SHOWN[page.file.src_uri]).read_text(encoding="utf-8").replace("](docs/", "](")
    for name, file in SHOWN.items():
        text = text.replace(f"]({file})", f"]({name})")
    return text


def on_page_content(html: str, **_: Any) -> str:
    """Drops the `::` that stands before a drawing in a docstring; Markdown needs none."""
    return html.replace("<p>::</p>\n", "")
