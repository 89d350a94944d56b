"""What every HTML page of this package has in common: `report.py` and `bench/page.py` put their parts into it."""

from __future__ import annotations

import html

__all__ = ["page", "text"]


def page(title: str, style: str, body: str) -> str:
    """A whole HTML page that needs no other file.

    Args:
        title: plain text.
        style: CSS.
        body: HTML.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def text(value: object) -> str:
    """Returns a value as HTML text."""
    return html.escape(str(value))
