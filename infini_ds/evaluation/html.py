"""Build Markdown lists and tables, and turn a Markdown report into one self-contained HTML file."""

import base64
import html
import re
from collections.abc import Iterable
from pathlib import Path

import markdown

HEAD = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1d2126; background: #fff;
  max-width: 1080px; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
h1 { margin: 0 0 1rem; }
h2 { margin: 3rem 0 1rem; padding-bottom: .3rem; border-bottom: 1px solid #dde1e6; }
h3 { margin: 2rem 0 .6rem; }
li { margin: .35rem 0; }
img { display: block; max-width: 100%; margin: 1rem auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid #e6e9ed; white-space: nowrap; }
th { border-bottom: 2px solid #c5cbd3; vertical-align: bottom; white-space: normal; }
tbody tr:hover { background: #f5f7fa; }
code, pre { font: .82rem/1.5 ui-monospace, monospace; background: #f5f7fa; border-radius: 4px; }
code { padding: .1rem .3rem; }
pre { padding: .8rem 1rem; overflow: auto; max-height: 24rem; }
pre code { padding: 0; }
"""


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def table(header: list[str], rows: Iterable[Iterable[object]], text_columns: tuple[str, ...] = ()) -> str:
    """Return a Markdown table. Columns are aligned to the right, except those named in `text_columns`."""
    alignment = ["---" if name in text_columns else "---:" for name in header]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [header, alignment, *rows])


def to_html(text: str, title: str, folder: Path) -> str:
    """Convert Markdown to an HTML page with its images embedded.

    Args:
        folder: that the image paths in the text are relative to.
    """

    def embed(match: re.Match[str]) -> str:
        image = base64.b64encode((folder / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{image}"'

    body = markdown.markdown(text, extensions=["tables", "fenced_code", "sane_lists"])
    body = re.sub(r'src="([^":]+\.png)"', embed, body)
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    head = f"{HEAD}<title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n'
