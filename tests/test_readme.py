"""The documents hold what they say: their Python runs, their commands are accepted, their links lead somewhere, and CI
runs README's commands."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cuflash.demo import machine

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    REPOSITORY / "CHANGELOG.md",
    *sorted((REPOSITORY / "docs").glob("**/*.md")),
]


NEEDS_A_GPU = "<!-- needs a GPU -->"  # the line before a block that runs on a GPU alone
_FENCED = re.compile(rf"^({re.escape(NEEDS_A_GPU)}\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a document: its language, the line its text starts at, and its text."""

    document: Path
    needs_gpu: bool
    language: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"


def fenced_blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    return [
        Block(document, bool(match[1]), match[2], text.count("\n", 0, match.start(3)) + 1, match[3])
        for match in _FENCED.finditer(text)
    ]


BLOCKS = [block for document in DOCUMENTS for block in fenced_blocks(document)]
PYTHON = [block for block in BLOCKS if block.language in ("python", "py", "pycon")]
SHELL = [block for block in BLOCKS if block.language in ("bash", "sh", "shell", "console")]


def readme_command(name: str) -> str:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(rf"^<!-- command: {name} -->\n```bash\n(.*)\n```$", readme, re.MULTILINE)
    return command


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_block_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block stands on its own: a reader may copy any one of them. Frameworks are optional, and so is a GPU."""
    if block.needs_gpu and (obstacle := machine.gpu_obstacle()):
        pytest.skip(f"{block} needs a GPU: {obstacle}")
    for framework in re.findall(r"^(?:import|from) (torch|jax|flax|equinox|transformers)\b", block.text, re.MULTILINE):
        pytest.importorskip(framework)
    monkeypatch.chdir(tmp_path)
    code = "\n" * (block.line - 1) + block.text  # so that a traceback points into the document
    exec(compile(code, str(block.document), "exec"), {"__name__": "__main__"})


def test_readme_opens_with_eight_lines_of_code() -> None:
    first = BLOCKS[0]
    assert (first.document.name, first.language) == ("README.md", "python")
    assert len([line for line in first.text.splitlines() if line.strip()]) <= 8


@pytest.mark.parametrize(
    ("name", "extra", "ending"), [("demo", "demo", "cuflash demo"), ("test", "test", "pytest --numprocesses=auto")]
)
def test_ci_runs_the_commands_of_the_readme(name: str, extra: str, ending: str) -> None:
    command = readme_command(name)
    assert command.startswith("python3 -m venv .venv && ")
    assert f'".[{extra}]"' in command
    assert command.endswith(ending)
    script = REPOSITORY / ".ci" / "run"
    printed = subprocess.run(["bash", script, "--print", name], check=True, capture_output=True, text=True).stdout
    assert printed == command + "\n"
    assert f"\nrun_readme_command {name} " in script.read_text(encoding="utf-8")


# ---- commands ----------------------------------------------------------------------------------------------------


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a block for a shell, as words; of a console, those behind a prompt."""
    text = block.text.replace("\\\n", " ")
    if block.language == "console":
        text = "\n".join(re.findall(r"^\$ (.*)$", text, re.MULTILINE))
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((i for i, word in enumerate(words) if word in ("&&", "||", "|", ";")), len(words))
            command, words = words[:end], words[end + 1 :]
            while command and re.match(r"\w+=", command[0]):  # a variable of this command's environment
                del command[0]
            if command:
                yield command


OWN = ("cuflash", "benchmarks", "examples")  # where the modules of this project are


def module_command(command: list[str]) -> tuple[str, list[str]] | None:
    """The module that a command runs, and its arguments, where these are this project's: not of venv and pip."""
    program, *arguments = command
    if Path(program).name == "cuflash":
        return "cuflash.cli", arguments
    if Path(program).name in ("python", "python3") and arguments[:1] == ["-m"]:
        module = arguments[1]
        if module == "pytest" or module.partition(".")[0] in OWN:
            return module, arguments[2:]
    return None


MODULES = [
    pytest.param(*command, id=f"{block}: {command[0]} {' '.join(command[1])}"[:60])
    for block in SHELL
    for command in map(module_command, commands(block))
    if command
]


class _AcceptedError(Exception):
    """The arguments of a command were accepted; it goes no further."""


@pytest.mark.parametrize(("module", "arguments"), MODULES)
def test_command_is_accepted(
    module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    """A command runs a module that is here, and its own parser takes the arguments."""
    if module == "pytest":
        markers = {line.partition(":")[0] for line in pytestconfig.getini("markers")}
        given = {word for option, word in itertools.pairwise(arguments) if option == "-m"}
        paths = [word for word in arguments if not word.startswith("-") and word not in given]
        assert given <= markers
        assert [path for path in paths if not (REPOSITORY / path).exists()] == []
        return
    monkeypatch.syspath_prepend(REPOSITORY)
    assert importlib.util.find_spec(module) is not None, f"there is no module {module}"
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(*given: Any, **options: Any) -> None:
        parse_args(*given, **options)
        raise _AcceptedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    warnings.simplefilter("ignore", RuntimeWarning)  # of runpy, where another test has imported the module
    try:
        with pytest.raises(_AcceptedError):
            runpy.run_module(module, run_name="__main__")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in OWN:
            raise
        pytest.skip(f"{module} needs {error.name}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_extras_exist(document: Path) -> None:
    named = re.findall(r"(?:cuflash|\"\.)\[([\w,]+)\]", document.read_text(encoding="utf-8"))
    extras = importlib.metadata.metadata("cuflash").get_all("Provides-Extra") or []
    assert {extra for names in named for extra in names.split(",")} - set(extras) == set()


# ---- links -------------------------------------------------------------------------------------------------------


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.+)$", _FENCED.sub("", document.read_text(encoding="utf-8")), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return set(found)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_local_links_lead_somewhere(document: Path) -> None:
    text = _FENCED.sub("", document.read_text(encoding="utf-8"))
    dead = []
    for target in re.findall(r"\]\(([^()\s]+)\)", text):
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        if "://" not in target and not (file.exists() and (not anchor or anchor in anchors(file))):
            dead.append(target)
    assert dead == []


@pytest.mark.parametrize("page", sorted((REPOSITORY / "docs").glob("**/*.md")), ids=lambda page: page.name)
def test_readme_links_to_every_page(page: Path) -> None:
    link = page.relative_to(REPOSITORY).as_posix()
    assert f"]({link}" in (REPOSITORY / "README.md").read_text(encoding="utf-8")
