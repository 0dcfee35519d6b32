"""The pages agree with the program: fields, links and version."""

import pathlib
import re
import runpy

import pytest

import hjepa_jax
from hjepa_jax.config import base_config
from hjepa_jax.config.fields import flatten
from tests.conftest import REPOSITORY

GUIDES = [
    REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(REPOSITORY.glob("docs/*.md"))
]  # fmt: skip
PAGES = [*GUIDES, *sorted(REPOSITORY.glob("experiments/**/*.md"))]


def test_every_config_field_is_in_the_docs_with_its_comment():
    fields = runpy.run_path(str(REPOSITORY / "docs/hooks.py"))["config_fields"]()
    assert [name for name, _, comment in fields if not comment] == []
    assert sorted(name for name, _, _ in fields) == sorted(flatten(base_config().to_dict()))


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_fields_and_configs_that_a_page_names_exist(page):
    text = page.read_text()
    groups = "|".join(base_config())
    named = set(re.findall(rf"(?:--config\.|`)((?:{groups})\.\w+)", text)) - {"data.source"}
    assert named <= set(flatten(base_config().to_dict()))
    for config in set(re.findall(r"configs/\w+\.py", text)):
        assert (REPOSITORY / config).exists(), config


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_of_a_page_lead_to_files(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text)
    for link in map("".join, links):
        made_by_the_site = page.parent.name == "docs" and link == "changelog.md"
        if link.startswith(("http", "#")) or made_by_the_site:
            continue
        assert (page.parent / pathlib.Path(link.split("#")[0])).exists(), link


def test_the_changelog_has_a_dated_section_of_this_version():
    changelog = (REPOSITORY / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[{hjepa_jax.__version__}\] - \d{{4}}-\d\d-\d\d$", changelog, re.M)
