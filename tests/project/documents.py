"""The project's documents as data: their code blocks, links, paths and commands."""

from __future__ import annotations

import re
from pathlib import Path

from .layers import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def name(path: Path) -> str:
    """How tests call a document."""
    return str(path.relative_to(ROOT))


def code_blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def links(path: Path) -> set[str]:
    """Targets of links and pictures that lie in the repository."""
    targets = re.findall(r"\]\(([^)#\s]+)\)", path.read_text(encoding="utf-8"))
    return {target for target in targets if "://" not in target}


def paths(path: Path) -> set[str]:
    """Files and folders of the repository that are named in code spans."""
    spans = re.findall(r"`([^`\n]+)`", path.read_text(encoding="utf-8"))
    return {span for span in spans if re.fullmatch(r"(fastmtl|csrc|tests|docs|bench)/[\w./]*", span)}


def make_targets(path: Path) -> set[str]:
    """Targets of `make` that the document tells its reader to use."""
    return set(re.findall(r"(?:^|`)make ([a-z-]+)\b", path.read_text(encoding="utf-8"), re.MULTILINE))
