"""The pages for users agree with the code: every option is described, every message that is quoted can be met."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from functools import cache

import pytest

import cuflash
from cuflash.demo import doctor
from tests.test_readme import REPOSITORY, Block, fenced_blocks

OPTIONS = REPOSITORY / "docs" / "options.md"
TROUBLESHOOTING = REPOSITORY / "docs" / "troubleshooting.md"
WILD = "…"  # what is filled in when a message is made


def test_every_option_is_described() -> None:
    functions = (cuflash.flash_attention, cuflash.flash_attention_backward)
    parameters = [parameter for function in functions for parameter in inspect.signature(function).parameters.values()]
    options = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    first_table = OPTIONS.read_text(encoding="utf-8").partition("\n## ")[0]
    assert options - set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", first_table)))) == set()


def test_every_line_of_the_doctor_is_described() -> None:
    (section,) = re.findall(
        r"^## What `cuflash doctor` prints$(.*?)^## ", TROUBLESHOOTING.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    cells = re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE)
    assert [name for name in doctor.CHECKS if not any(name in cell for cell in cells)] == []


# ---- messages ----------------------------------------------------------------------------------------------------


def quoted_messages(block: Block) -> Iterator[str]:
    """One a line; a line that is indented goes on with the one before."""
    for message in re.split(r"\n(?! )", block.text.rstrip("\n")):
        yield " ".join(message.split())


QUOTED = [
    pytest.param(message, id=f"{block.line}: {message}"[:60])
    for block in fenced_blocks(TROUBLESHOOTING)
    if block.language == "text"
    for message in quoted_messages(block)
]


@pytest.mark.parametrize("message", QUOTED)
def test_quoted_message_is_in_the_source(message: str) -> None:
    assert any(template.fullmatch(message) for template in templates())


@cache
def templates() -> list[re.Pattern[str]]:
    """The messages that the Python sources can make, with any one word where something is filled in."""
    trees = [
        ast.parse(path.read_text(encoding="utf-8"))
        for folder in ("cuflash", "adapters")
        for path in sorted((REPOSITORY / folder).glob("**/*.py"))
    ]
    constants: dict[str, ast.expr] = {}
    for tree in trees:
        constants |= _assigned(tree.body)
    found: set[str] = set()
    for tree in trees:
        for statement in _functions(tree):
            names = {**constants, **_assigned(ast.walk(statement))}
            found |= {_template(_text(node, names)) for node in ast.walk(statement) if isinstance(node, ast.expr)}
    # A mark may stand for a single word; in front there may be the name of what failed.
    return [re.compile(r"(\S+: )?" + r"\S+".join(map(re.escape, text.split(WILD)))) for text in found if text != WILD]


def _functions(tree: ast.Module) -> Iterator[ast.stmt]:
    """The functions and methods of a module, and what stands outside of them."""
    for statement in tree.body:
        yield from statement.body if isinstance(statement, ast.ClassDef) else [statement]


def _assigned(nodes: Iterable[ast.AST]) -> dict[str, ast.expr]:
    return {
        node.targets[0].id: node.value
        for node in nodes
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }


def _text(node: ast.expr, names: dict[str, ast.expr], depth: int = 3) -> str:
    """What an expression says, as far as it is written in it; names stand for what they were assigned."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = node.value
    elif isinstance(node, ast.JoinedStr):
        text = "".join(_text(part, names, depth) for part in node.values)
    elif isinstance(node, ast.FormattedValue) and node.conversion == -1:
        text = _text(node.value, names, depth)
    elif isinstance(node, ast.Name) and node.id in names and depth:
        text = _text(names[node.id], names, depth - 1)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "bad":
        name, was, allowed = (_text(argument, names, depth) for argument in node.args[:3])
        text = f"{name}: got {was}; allowed: {allowed}"
    else:
        text = WILD
    return text


def _template(text: str) -> str:
    """A message with single spaces, and one mark for what is filled in side by side or by the logging module."""
    text = re.sub(r"%[.\d]*[a-z]", WILD, " ".join(text.split()))
    return re.sub(rf"{WILD}([ .]?{WILD})+", WILD, text).removeprefix("; ")
