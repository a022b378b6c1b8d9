"""Every example of README.md and docs/ runs as it is printed, and every page is in the navigation.

The ``python`` blocks of one page share a namespace and run in order, each page with a registry of its own. A block
that cannot run here follows a comment ``<!-- no-run: reason -->``.
"""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ssa_framework import registry as registry_module

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "bash", "text", "toml", "yaml", "json"}
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*).*$")
NO_RUN = re.compile(r"<!-- no-run: \S.*-->")
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)#\s]+)(#[^)\s]*)?\)")


@dataclass(frozen=True)
class Block:
    language: str
    line: int
    code: str
    runs: bool


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page; ``line`` is the number of the first line inside."""
    lines = page.read_text(encoding="utf-8").splitlines()
    number, before = 0, ""
    while number < len(lines):
        opening = FENCE.match(lines[number])
        if opening is None:
            before = lines[number].strip() or before
            number += 1
            continue
        close = opening["indent"] + "```"
        end = lines.index(close, number + 1)
        code = textwrap.dedent("\n".join(lines[number + 1 : end])) + "\n"
        yield Block(opening["language"], number + 2, code, NO_RUN.fullmatch(before) is None)
        number, before = end + 1, ""


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def has_examples(page: Path) -> bool:
    return any(block.language == "python" for block in blocks(page))


@pytest.mark.parametrize("page", [page for page in PAGES if has_examples(page)], ids=page_id)
def test_examples_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry_module, "_default", None)  # what a page registers stays in the page
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for block in blocks(page):
        if block.language == "python" and block.runs:
            # blank lines in front, so that a traceback names the line of the page
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec", dont_inherit=True)
            exec(code, namespace)


def test_sources_of_the_tutorial_keep_the_contract(tmp_path: Path) -> None:
    page = ROOT / "docs" / "write-a-source.md"
    module = tmp_path / "test_tutorial.py"
    module.write_text("".join(block.code for block in blocks(page) if block.language == "python"), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(module)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_blocks_name_their_language(page: Path) -> None:
    unknown = {f"line {block.line - 1}: {block.language!r}" for block in blocks(page)} - {
        f"line {block.line - 1}: {block.language!r}" for block in blocks(page) if block.language in LANGUAGES
    }
    assert not unknown, f"only {sorted(LANGUAGES)} are looked at; here: {sorted(unknown)}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_relative_links_lead_to_files(page: Path) -> None:
    targets = [match["target"] for match in LINK.finditer(page.read_text(encoding="utf-8"))]
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


def test_navigation_lists_every_page() -> None:
    # a regular expression, not a YAML parser: the test extra brings none
    listed = re.findall(r"^ +- [^:]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    written = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]]
    assert sorted(listed) == sorted(written)


@pytest.mark.parametrize(
    "command",
    ["pip install -c constraints.txt -e . && ssa demo", "pip install -c constraints.txt -e '.[test]' && pytest"],
)
def test_readme_and_quick_start_print_the_two_commands(command: str) -> None:
    for page in (ROOT / "README.md", ROOT / "docs" / "quickstart.md"):
        assert command in [line for b in blocks(page) if b.language == "bash" for line in b.code.splitlines()]
