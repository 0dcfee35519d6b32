"""Markdown, and one self-contained HTML file from it: pictures inline, light and dark."""

import base64
import html
import re
from collections.abc import Mapping, Sequence

from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from hjepa_jax.runtime.names import printable

# Heading, Markdown, and figures with captions by file name.
Section = tuple[str, str, dict[str, tuple[Figure, str]]]

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #ffffff; --line: #d0d7de;
  --soft: #f6f8fa; --link: #0969da; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #0d1117; --line: #30363d; --soft: #161b22; --link: #58a6ff; } }
body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif;
  max-width: 64rem; margin: 0 auto; padding: 1.5rem; }
h1 { line-height: 1.2; margin: 0 0 .6rem; } h2 { margin-top: 1.6rem; padding-bottom: .2rem;
  border-bottom: 1px solid var(--line); }
a { color: var(--link); }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: .25rem .6rem; text-align: left; }
th { background: var(--soft); }
img { max-width: 100%; height: auto; }
figure { margin: 1.2rem 0; } figcaption { font-size: .9rem; opacity: .8; }
code { background: var(--soft); padding: .1rem .3rem; border-radius: 4px; overflow-wrap: anywhere; }
.row { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1rem; align-items: start;
  margin: 1.2rem 0; }
.row figure { margin: 0; }
@media (max-width: 40rem) {
  body { padding: 1rem; } .row { grid-template-columns: 1fr; }
  table { font-size: .78rem; } th, td { padding: .2rem .35rem; overflow-wrap: anywhere; }
  th, [style*=right] { overflow-wrap: normal; }
  th:first-child, td:first-child { overflow-wrap: break-word; position: sticky; left: 0;
    background: var(--soft); } }
pre { background: var(--soft); padding: .8rem; border-radius: 6px; overflow-x: auto; }
pre code { padding: 0; }
"""


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a Markdown table; columns of numbers, except the first, are right-aligned."""
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [
        all(re.match(r"^[-+]?[\d.]|^-?$", row[i]) for row in cells) for i in range(len(heads))
    ]
    rule = ["---:" if is_numeric and i else "---" for i, is_numeric in enumerate(numeric)]
    return "\n".join(
        "| " + " | ".join(row) + " |" for row in [[_cell(h) for h in heads], rule, *cells]
    )


def _cell(value: object) -> str:
    return printable(str(value)).replace("|", "\\|")


def escape(name: str) -> str:
    """Returns Markdown that shows a name literally. Vertical bars are left to `table`."""
    marks = r"[\\`*{}\[\]<>#~&!$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"
    return re.sub(marks, r"\\\g<0>", printable(name))


def code(value: object) -> str:
    """Returns a value as a Markdown code span; it may contain backticks."""
    text = printable(str(value))
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in text or not text.strip() else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def slug(heading: str) -> str:
    """Returns the HTML id of a section."""
    return re.sub(r"\W+", "-", heading.lower())


def to_html(markdown: str, *, title: str, pictures: Mapping[str, tuple[bytes, bytes]]) -> str:
    """Returns a page that loads no other file.

    HTML in `markdown` is shown literally. `pictures` are PNG files for light and dark pages, by
    their address in the text.
    """
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    body = re.sub(r"<h2>(.*?)</h2>", lambda h: f'<h2 id="{slug(h[1])}">{h[1]}</h2>', body)
    for address, (light, dark) in pictures.items():
        source = f'<source media="(prefers-color-scheme: dark)" srcset="{data_address(dark)}">'
        body = re.sub(
            f'<p><img src="{re.escape(address)}"( alt="([^"]*)"[^>]*)></p>',
            lambda found, source=source, light=light: (
                f'<figure><picture>{source}<img src="{data_address(light)}"{found[1]}></picture>'
                f"<figcaption>{found[2]}</figcaption></figure>"
            ),
            body,
        )
    start, *rest = re.split("(?=<h2 )", body)
    if rest and rest[0].count("<figure>") > 1:  # the pictures of the first section, side by side
        rest[0] = rest[0].replace("<figure>", '<div class="row"><figure>', 1)
        rest[0] = "</figure></div>".join(rest[0].rsplit("</figure>", 1))
    return html_page("".join([start, *rest]), title)


def html_page(body: str, title: str, style: str = "") -> str:
    """Returns a complete page with the HTML `body`, for phones and screens, light and dark."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{html.escape(printable(title))}</title>\n'
        f"<style>{_STYLE}{style}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def data_address(picture: bytes, kind: str = "png") -> str:
    """Returns a picture as a data URL, so that the page loads no other file."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
