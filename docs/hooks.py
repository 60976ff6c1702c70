"""For the docs site: what a page links to outside of ``docs`` is only in the repository, so it is named, not linked."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
_LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with its links out of ``docs`` as text.

    Raises:
        FileNotFoundError: what a link names isn't there.
    """
    folder = (DOCS / page.file.src_uri).parent

    def named(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / link[2]))
        if target.is_relative_to(DOCS):
            return link[0]
        if not target.exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {link[2]}, which isn't there")
        name = target.relative_to(DOCS.parent)
        return link[1] if link[1] == str(name) else f"{link[1]} (`{name}`)"

    return _LINK.sub(named, markdown)
