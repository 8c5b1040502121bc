"""What README.md and CONTRIBUTING.md tell people to type exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from bitwright import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md")


def code_lines(page: str) -> list[str]:
    """The lines of every fenced block that is no printed text, comments cut off."""
    fenced = re.findall(r"```(\w*)\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    blocks = [block for language, block in fenced if language != "text"]
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]


def options_of(command: str) -> set[str]:
    """Every option that a command takes."""
    import typer

    group = typer.main.get_command(cli.app)
    found = group.commands[command]  # type: ignore[attr-defined]
    return {o for p in found.params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")} | {"--debug", "--help"}


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {m for line in code_lines(page) for m in re.findall(r"^make ([a-z-]+)", line)}
    assert used - targets == set()


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_options_exist(page: str) -> None:
    import typer

    names = set(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
    for line in code_lines(page):
        if not line.startswith("bitwright "):
            continue
        words = shlex.split(line.replace("[", "").replace("]", "").replace("|", " "))
        assert words[1] in names, line
        used = {w for w in words[2:] if re.fullmatch(r"--?[a-z][a-z-]*", w)}
        assert used - options_of(words[1]) == set(), line


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    places = re.findall(
        r"`((?:ir|passes|frontends|codegen|runtime|tests|examples|docs|src|benchmarks)/[\w/.-]+)`", text
    )
    assert {p for p in [*links, *places] if not (ROOT / p).exists()} == set()


def test_the_two_commands_are_there() -> None:
    assert {"make demo", "make test"} <= set(code_lines("README.md"))


def test_python_in_the_readme_compiles() -> None:
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        compile(block, "README.md", "exec")
