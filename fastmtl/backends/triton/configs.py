"""Launch choices: how large a program's block is, how many warps run it. Keyed by shape, never tuned at run time.

Chosen by the compilers' resource reports for sm_80, sm_90 and sm_100 (registers, shared memory, no spills), and not yet
by measurement: docs/gpu.md says what waits for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from .launch import Warps, power_of_two


@dataclass(frozen=True)
class Lookup:
    """A block of batch rows times table columns."""

    block_b: int
    block_d: int
    warps: Warps


@dataclass(frozen=True)
class Segments:
    """The walk over sorted rows: ``walkers`` runs of ``chunk`` lookups a program, ``block_d`` columns at once."""

    chunk: int
    walkers: int
    block_d: int
    warps: Warps


@dataclass(frozen=True)
class Tiny:
    """Sums of a tiny table: blocks of ``block_b`` batch rows, ``rows`` of them a program."""

    block_b: int
    block_d: int
    rows: int
    warps: Warps


@dataclass(frozen=True)
class EmbeddingConfig:
    """Choices of embedding_bag.

    Args:
        tiny_vocab: tables of at most so many rows are summed without a sort; a class's upper end of ``tiny_classes``.
        tiny_classes: sizes of the block of table rows; a table takes the smallest that holds it.
        elements: elements of a block of batch rows times columns.
        max_block_d: columns of a block; wider tables take several.
        stitched: chunks looked at in one step when a long segment's partial sums are added.
    """

    tiny_vocab: int = 128
    tiny_classes: tuple[int, ...] = (16, 128)
    elements: int = 2048
    max_block_d: int = 256
    stitched: int = 32

    def lookup(self, dim: int) -> Lookup:
        """Of the forward."""
        block_d = min(power_of_two(dim), self.max_block_d)
        return Lookup(max(self.elements // block_d, 1), block_d, Warps(4))

    def segments(self, n: int, dim: int) -> Segments:
        """Of the backward over ``n`` sorted lookups."""
        block_d = min(power_of_two(dim), self.max_block_d)
        chunk = 8 if n < 2**18 else 32  # short walks fill the machine, long ones leave fewer pieces to stitch
        return Segments(chunk, max(self.elements // block_d, 1), block_d, Warps(4))

    def tiny(self, n_rows: int, dim: int) -> Tiny:
        """Of the backward of tiny tables over a batch of ``n_rows``."""
        return Tiny(64, min(power_of_two(dim, 16), 64), max(256, n_rows // 64), Warps(4))


EMBEDDING = EmbeddingConfig()
