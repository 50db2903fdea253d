"""README and docs say what is so: commands compose, files and links exist, table and picture are up to date, and the
README's length stays readable."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from models.build import problems
from scripts.figures import family
from scripts.recipes import BEGIN, END, PAGE, PRESETS, Recipe, recipe, table, with_table
from tests.conftest import ROOT
from tests.test_config import CONF, composed

README = (ROOT / "README.md").read_text()
FILES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
PAGES = "".join(path.read_text() for path in FILES)
COMMANDS = [line.strip() for line in PAGES.splitlines() if "train.py " in line and line.startswith("    ")]
SCRIPTS = r"^    python scripts/(evaluate|generate|export|report)\.py (.*)$"
LONGEST = 100  # lines of README.md: one screen and a half


@pytest.fixture(scope="module")
def recipes() -> list[Recipe]:
    return [recipe(preset, "340m") for preset in PRESETS]


@pytest.mark.parametrize(
    "command", [line if line in README else pytest.param(line, marks=pytest.mark.slow) for line in COMMANDS]
)
def test_commands_compose(command):
    """Every override names something that exists; sweeps are tried at each of their points' first values."""
    words = shlex.split(command.split(" # ")[0], comments=True)
    overrides = [word for word in words[words.index("train.py") + 1 :] if "=" in word]
    if "-m" in words:
        overrides = [re.sub(r"=([^,\[]+),.*", r"=\1", word) for word in overrides]
    cfg = composed(*overrides)
    assert list(problems(OmegaConf.to_container(cfg, resolve=True))) == []


@pytest.mark.parametrize(("script", "line"), re.findall(SCRIPTS, PAGES, flags=re.MULTILINE))
def test_commands_of_scripts_are_understood(script, line):
    """By the parser of the script, without what the shell takes for itself."""
    words = shlex.split(line.partition(" > ")[0], comments=True)
    assert import_module(f"scripts.{script}").arguments(words)


def test_there_are_commands():
    assert len(COMMANDS) > 8


def test_the_readme_is_short():
    assert len(README.splitlines()) <= LONGEST


def test_the_build_of_torch_is_the_pinned_one():
    """Another version would be replaced by the large build of the pinned one."""
    (pinned,) = re.findall(r"^torch==.*$", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)
    assert f"pip install {pinned} --index-url" in README


def test_named_files_exist():
    for path in re.findall(r"\b(?:models|conf|tests|scripts|data)/[\w/]+\.\w+\b", PAGES):
        if "NAME" not in path:
            assert (ROOT / path).exists(), path


def anchors(page: Path) -> set[str]:
    """What a link to one of its headings may be called."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", FILES, ids=lambda path: path.stem)
def test_relative_links_resolve(page):
    """To files of the repository and to headings in them. Pages of docs link to docs alone, of which a site is made."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        assert not heading or heading in anchors(target), f"{page.name}: {link}"
        if page.parent.name == "docs":
            assert target.is_relative_to(ROOT / "docs"), f"{page.name}: {link} leaves docs"


@pytest.mark.parametrize("page", FILES, ids=lambda path: path.stem)
def test_formulas_are_code(page):
    """The site sets no mathematics, and GitHub sets less than TeX has. Both show plain text alike."""
    commands = r"^    .*"
    assert not re.search(r"\$|\\[\[(]", re.sub(commands, "", prose(page), flags=re.MULTILINE))


def test_every_page_is_in_reach():
    """From the README or from the overview of the site."""
    index = README + (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"{page.name})" in index, f"no link to {page.name}"


def test_every_script_has_its_place_in_the_house():
    house = (ROOT / "docs/index.md").read_text().partition("scripts/")[2].partition("docs/")[0]
    named = set(re.findall(r"\w+", house))
    assert {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"__init__"} <= named


def test_every_model_and_corpus_is_named():
    for group in ("model", "data", "tokenizer", "size"):
        for path in (CONF / group).glob("*.yaml"):
            named = re.search(rf"(?<!\w){path.stem}(?!\w)", PAGES)
            assert path.stem == "base" or named, f"{group}={path.stem} is in no page"


def test_every_mixer_has_its_formula():
    """A heading of its own and a block of text beneath it."""
    found = re.findall(r"^### (\w+)\n\n```text\n", PAGE.read_text(), flags=re.MULTILINE)
    assert sorted(found) == PRESETS


@pytest.mark.slow
def test_the_table_of_mixers_is_what_the_script_prints(recipes):
    page = PAGE.read_text()
    assert page.count(BEGIN) == page.count(END) == 1
    assert with_table(page, table(recipes, markdown=True)) == page, "python scripts/recipes.py --write"


@pytest.mark.slow
def test_the_picture_is_what_the_script_draws(recipes, tmp_path):
    """Its words, in order: another matplotlib draws other lines. Every preset is among them."""

    def words(path: Path) -> list[str]:
        return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())

    drawn = words(family.write(recipes, tmp_path))
    assert {word.removesuffix(" +") for word in drawn} >= set(PRESETS)
    assert words(ROOT / "docs" / "family.svg") == drawn, "python scripts/figures/family.py"
