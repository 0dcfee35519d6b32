"""What `mkdocs build` adds to the pages: config fields, experiments, changelog and formulas."""

import pathlib
import re
import runpy
from typing import Any

REPOSITORY = pathlib.Path(__file__).parents[1]
# By its path: the tools of the site are installed without the package.
config_fields = runpy.run_path(str(REPOSITORY / "hjepa_jax/config/meanings.py"))["config_fields"]
KEPT = (".md", ".csv", ".png", ".py", ".sbatch", ".yaml")


def config_tables() -> str:
    """Returns a Markdown table of the fields for each group of the config."""
    groups: dict[str, list[str]] = {}
    for name, default, comment in config_fields():
        comment = re.sub(r"[|<>]", lambda m: f"&#{ord(m[0])};", comment)
        group = name.rpartition(".")[0] or "The run"
        groups.setdefault(group, []).append(f"| `{name}` | `{default}` | {comment} |\n")
    head = "| field | default | meaning |\n|---|---|---|\n"
    return "\n\n".join(
        f'## {name}\n\n<div class="fields" markdown="1">\n\n{head}{"".join(rows)}\n</div>'
        for name, rows in groups.items()
    )


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages and files of experiments/, and the changelog."""
    from mkdocs.structure.files import File

    found = {"changelog.md": REPOSITORY / "CHANGELOG.md"}
    for path in sorted((REPOSITORY / "experiments").rglob("*.*")):
        if path.suffix in KEPT and "__pycache__" not in path.parts:
            found[path.relative_to(REPOSITORY).as_posix()] = path
    for uri, path in found.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Fills in the table of fields, formulas as MathML, and links between the site's two halves."""
    if page.file.src_uri.startswith("experiments/"):
        markdown = markdown.replace("](../../docs/", "](../../").replace("](../docs/", "](../")
    else:
        markdown = markdown.replace("](../experiments/", "](experiments/")
    if page.file.src_uri == "configuration.md":
        markdown = markdown.replace("<!-- config fields -->", config_tables())
    return formulas(markdown)


def formulas(markdown: str) -> str:
    """Writes `$...$` and `$$...$$` outside of code as MathML, which browsers show by themselves."""
    from latex2mathml.converter import convert

    def replace(match: re.Match[str]) -> str:
        block, inline = match.groups()
        if block:
            return f'<div class="formula">{convert(block.strip(), display="block")}</div>'
        # A span, as Markdown takes a line that begins with <math> for a block.
        return f"<span>{convert(inline)}</span>" if inline else match[0]

    return re.sub(
        r"```.*?```|`[^`\n]*`|\$\$(.+?)\$\$|\$([^$\n]+?)\$", replace, markdown, flags=re.S
    )
