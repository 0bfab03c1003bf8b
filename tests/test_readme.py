"""Runs the Python blocks of the README in order; parses the commands in its shell blocks and in the quickstart."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from lipcert.cli import COMMANDS, cli
from lipcert.errors import InputError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """Return the arguments of every lipcert call in a shell text."""
    found = []
    for line in re.sub(r"\\\n|\$\([^)]*\)", " ", text).splitlines():
        words = shlex.split(line, comments=True)
        for start in (["lipcert"], ["-m", "lipcert"]):
            for i in range(len(words) - len(start) + 1):
                if words[i : i + len(start)] == start and (i == 0 or start[0] == "-m"):
                    found.append([word for word in words[i + len(start) :] if word != ">/dev/null"])
    return found


CALLS = [call for block in blocks("bash") for call in commands(block)]
CALLS += [call for call in commands((ROOT / "scripts" / "quickstart").read_text())]


def check(arguments: list[str]) -> None:
    """Parse one call as the command line would, without running it."""
    name, *rest = arguments
    parent = cli.make_context("lipcert", [name])
    cli.get_command(parent, name).make_context(name, rest, parent=parent)


def test_there_are_blocks_to_test() -> None:
    assert len(blocks("python")) >= 3 and len(CALLS) >= 20
    assert README.index("scripts/quickstart") < README.index("scripts/test") < README.index("lipcert trains")
    assert {call[0] for call in CALLS} == set(COMMANDS)


def test_python_blocks_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lipcert.registry import models

    monkeypatch.chdir(tmp_path)
    assert models.list()  # all are registered now, so that the README's model can be taken back after the test
    monkeypatch.setattr(models, "_entries", dict(models._entries))
    space: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), space)
    assert 0 < space["bound"] < float("inf")
    assert list(space["rows"]["idx"]) == list(range(50)) and (space["rows"]["radius"] >= 0).all()
    assert 0 < space["small"].upper.require_upper() < float("inf")


@pytest.mark.parametrize("call", CALLS, ids=" ".join)
def test_commands_parse(call: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check(call)


@pytest.mark.parametrize("wrong", ["bound", "bound x --deep", "certify x --radii abc", "train -o x --eps a", "sing"])
def test_the_check_refuses_what_the_command_line_would(wrong: str) -> None:
    with pytest.raises((click.UsageError, InputError)):
        check(wrong.split())


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for script in ("scripts/quickstart", "scripts/test", ".ci/run"):
        assert (ROOT / script).stat().st_mode & 0o111, f"{script} is not executable"
