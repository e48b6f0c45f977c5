"""The layers of fastmtl, and what of a module's source breaks them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fastmtl"

#: First part of a module's name under fastmtl -> its rank. A module imports its own layer and those of lower rank.
RANKS = {
    "__main__": 11,
    "cli": 10,
    "__init__": 9.5,
    "trainers": 9,
    "utils": 8, "serving": 8,
    "weighting": 7, "models": 7, "data": 7, "optim": 7,
    "basic": 6,
    "ops": 5,
    "backend": 4,
    "backends": 3,
    "spec": 1, "errors": 1,
}  # fmt: skip


class Import(NamedTuple):
    """One import statement's target: a dotted name, and the line it stands in."""

    name: str
    line: int


def modules() -> list[Path]:
    """Every Python file of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def layer(module: str) -> str:
    """``"fastmtl.models.multi_task.ple"`` -> ``"models"``; the package itself is ``"__init__"``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def dotted(path: Path) -> tuple[str, str]:
    """The module in ``path`` and the package that its relative imports start from."""
    parts = ("fastmtl", *path.relative_to(PACKAGE).with_suffix("").parts)
    package = ".".join(parts[:-1])
    return (package if parts[-1] == "__init__" else ".".join(parts)), package


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(tree: ast.AST, package: str) -> Iterator[Import]:
    """All imports of a module, wherever they stand: at the top, in functions, under TYPE_CHECKING, by a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, (parent, node.module)))
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield Import(name if base.startswith("fastmtl") and _is_module(name) else base, node.lineno)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__", "require") and isinstance(node.args[0].value, str):
                yield Import(node.args[0].value, node.lineno)


def violations(source: str, path: Path) -> list[str]:
    """What the source, standing at ``path``, imports and must not: ``"file:line: why"``."""
    module, package = dotted(path)
    own, found = layer(module), []
    for target, line in imports(ast.parse(source), package):
        where = f"{path.relative_to(ROOT)}:{line}"
        if target.partition(".")[0] == "torch_rechub":
            found.append(f"{where}: imports {target}; torch-rechub is for tests alone")
        if target.partition(".")[0] != "fastmtl":
            continue
        other = layer(target)
        if other not in RANKS:
            found.append(
                f"{where}: imports {target}, which is in no layer; give {other!r} a rank in {Path(__file__).name}"
            )
        elif other != own and RANKS[other] >= RANKS[own]:
            found.append(f"{where}: {own!r} (rank {RANKS[own]}) imports {target} of {other!r} (rank {RANKS[other]})")
    return found
