"""The documents hold what they say: their Python runs, their links lead somewhere, and CI runs README's commands."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    REPOSITORY / "CHANGELOG.md",
    *sorted((REPOSITORY / "docs").glob("**/*.md")),
]


class Block(NamedTuple):
    """A fenced block of a document: its language, the line its text starts at, and its text."""

    document: Path
    language: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"


def fenced_blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    return [
        Block(document, match[1], text.count("\n", 0, match.start(2)) + 1, match[2])
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


BLOCKS = [block for document in DOCUMENTS for block in fenced_blocks(document)]
PYTHON = [block for block in BLOCKS if block.language in ("python", "py", "pycon")]


def readme_command(name: str) -> str:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(rf"^<!-- command: {name} -->\n```bash\n(.*)\n```$", readme, re.MULTILINE)
    return command


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_block_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block stands on its own: a reader may copy any one of them. Frameworks are optional."""
    for framework in re.findall(r"^(?:import|from) (torch|jax|flax|equinox|transformers)\b", block.text, re.MULTILINE):
        pytest.importorskip(framework)
    monkeypatch.chdir(tmp_path)
    code = "\n" * (block.line - 1) + block.text  # so that a traceback points into the document
    exec(compile(code, str(block.document), "exec"), {"__name__": "__main__"})


def test_readme_opens_with_eight_lines_of_code() -> None:
    first = BLOCKS[0]
    assert (first.document.name, first.language) == ("README.md", "python")
    assert len([line for line in first.text.splitlines() if line.strip()]) <= 8


@pytest.mark.parametrize(("name", "extra", "ending"), [("demo", "demo", "cuflash demo"), ("test", "test", "pytest")])
def test_ci_runs_the_commands_of_the_readme(name: str, extra: str, ending: str) -> None:
    command = readme_command(name)
    assert command.startswith("python3 -m venv .venv && ")
    assert f'".[{extra}]"' in command
    assert command.endswith(ending)
    script = REPOSITORY / ".ci" / "run"
    printed = subprocess.run(["bash", script, "--print", name], check=True, capture_output=True, text=True).stdout
    assert printed == command + "\n"
    assert f"\nrun_readme_command {name} " in script.read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_local_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^()\s]+)\)", text)]
    local = [target for target in targets if target and "://" not in target]
    assert [target for target in local if not (document.parent / target).exists()] == []
