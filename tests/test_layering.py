"""The rooms of jebi stand in one order and nothing imports upward; read from the source, nothing is run.

Imports inside functions count, those under ``TYPE_CHECKING`` do not: they are gone when the program runs.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "jebi"

ORDER = (
    "errors", "imports", "config", "quant", "kernels", "nn", "models", "adapters", "plan", "data",
    "training", "inference", "export", "fast", "run", "inspection", "cli", "__init__", "__main__",
)  # fmt: skip
"""Each may import those before it. (`export` is planned.)"""

APART = ("training", "inference", "export")
"""These do not import one another."""

FILES = sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of the modules that the code imports when it runs; ``from a import b`` yields ``a.b``."""
    if isinstance(tree, ast.Import):
        yield from (alias.name for alias in tree.names)
    elif isinstance(tree, ast.ImportFrom):
        assert tree.level == 0, "imports inside jebi are absolute"
        yield from (f"{tree.module}.{alias.name}" for alias in tree.names)
    elif isinstance(tree, ast.If) and ast.unparse(tree.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        for node in tree.orelse:
            yield from imports(node)
    else:
        for node in ast.iter_child_nodes(tree):
            yield from imports(node)


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
        parts = name.split(".")
        if parts[0] == "jebi":
            # `from jebi import name` is the package itself, unless the name is a room's.
            rooms.add(parts[1] if len(parts) > 1 and parts[1] in ORDER else "__init__")
    return rooms


def test_every_room_has_its_place() -> None:
    assert {room_of(path) for path in FILES} <= set(ORDER)
    assert len(FILES) > 50


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_imports_upward(path: Path) -> None:
    room = room_of(path)
    for other in imported_rooms(path) - {room}:
        assert ORDER.index(other) < ORDER.index(room), f"{path.name} of '{room}' imports '{other}'"
        assert not (room in APART and other in APART), f"'{room}' and '{other}' do not import one another"


def test_modules_are_imported_by_statement() -> None:
    """What is imported by a computed name cannot be seen here. The one exception is the table of public names."""
    for path in FILES:
        if path == SOURCE / "__init__.py":
            continue
        text = path.read_text(encoding="utf-8")
        assert not any(word in text for word in ("import_module", "__import__", "exec(", "sys.modules")), path


def test_a_public_name_lives_in_a_room() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    (homes,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES"
    )
    for home in homes.values():
        assert home.split(".")[1] in ORDER[: ORDER.index("cli")]


def test_the_walk_sees_what_it_should() -> None:
    code = """
from typing import TYPE_CHECKING
import jebi.nn.rows as rows
if TYPE_CHECKING:
    from jebi.cli import main
else:
    from jebi.data import rows
def later():
    with open("x"):
        from jebi.run import train
"""
    found = set(imports(ast.parse(code)))
    assert found == {"typing.TYPE_CHECKING", "jebi.nn.rows", "jebi.data.rows", "jebi.run.train"}
