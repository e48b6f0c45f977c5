"""Launch choices: how large a program's block is, how many warps run it. Keyed by shape, never tuned at run time.

Chosen by the compilers' resource reports for sm_80, sm_90 and sm_100 (registers, shared memory, no spills), few of them
by measurement: docs/gpu.md says which wait for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from .launch import Warps, alignment, cdiv, power_of_two, round_up

#: Programs that run at a time on the largest machine, one a multiprocessor.
PROGRAMS = 132

#: Runs of a batch at most that leave pieces of a sum behind: what adds them up holds all of a column's in registers.
PIECES = 256


@dataclass(frozen=True)
class Lookup:
    """A block of batch rows times table columns."""

    block_b: int
    block_d: int
    warps: Warps


@dataclass(frozen=True)
class Index:
    """The rows of a batch: ``block_b`` rows of it and ``bags`` bags a program, of 4 warps; then, sorted, ``block`` of
    them at a time by ``most_runs`` programs at most, whose ``warps`` these are."""

    block_b: int
    bags: int
    block: int
    most_runs: int
    warps: Warps


@dataclass(frozen=True)
class Segments:
    """The sums over sorted rows: ``pieces`` of them at once, ``block_d`` columns of each; ``programs``, that take one
    block after the other."""

    pieces: int
    block_d: int
    programs: int
    warps: Warps


@dataclass(frozen=True)
class Stitch:
    """Sums of rows of several pieces: ``stitched`` pieces at once; ``programs``, that take one row after the other."""

    stitched: int
    programs: int
    warps: Warps


@dataclass(frozen=True)
class Replay:
    """Rows that make up for missed steps: a program sorts ``gathered`` of them and moves ``block_r`` at once,
    ``block_d`` columns of each."""

    gathered: int
    block_r: int
    block_d: int
    warps: Warps


@dataclass(frozen=True)
class Tiny:
    """Sums of tiny tables: slices of ``block_v`` rows, blocks of ``block_b`` batch rows, ``rows`` of them a program."""

    block_v: int
    block_b: int
    block_d: int
    rows: int
    warps: Warps


@dataclass(frozen=True)
class Elements:
    """Elements of a program that looks at each alone."""

    block: int
    warps: Warps


@dataclass(frozen=True)
class EmbeddingConfig:
    """Choices of embedding_bag.

    Args:
        tiny_vocab: tables of at most so many rows are summed without a sort.
        sliced: rows of a tiny table that a program sums.
        looked_up: elements of a block of batch rows times columns that are looked up.
        elements: of such a block of a gradient.
        max_block_d: columns of a block; wider tables take several.
        replayed: elements of a block of rows that move together.
        gathered: rows that are sorted by the steps they missed; a quarter of them where there are few.
        indexed: sorted lookups that are looked at at once.
        most_runs: programs that share the sorted lookups, at most.
        resident: programs of one warp for each multiprocessor, at most.
        multiprocessors: for how many of them there is work.
        stitched: pieces of a row that are added at once, at most.
        tiny_runs: runs of the batch whose sums of tiny tables are added, at most.
    """

    tiny_vocab: int = 128
    sliced: int = 16
    looked_up: int = 1024
    elements: int = 1024
    max_block_d: int = 256
    replayed: int = 128
    gathered: int = 128
    indexed: int = 1024
    most_runs: int = 1024
    resident: int = 64
    multiprocessors: int = PROGRAMS
    stitched: int = 128
    tiny_runs: int = 128

    def lookup(self, dim: int) -> Lookup:
        """Of the forward."""
        block_d = min(power_of_two(dim), self.max_block_d)
        return Lookup(max(self.looked_up // block_d, 1), block_d, Warps(4))

    def index(self, n: int) -> Index:
        """Of the index of ``n`` lookups that are sorted."""
        return Index(max(self.elements // 8, 1), 8, self.indexed, self.most_runs, Warps(8))

    def chunk(self, n: int) -> int:
        """Lookups of a piece of a row that has more, of ``n``: few where there are few, for whom a long piece would be
        waited for."""
        return 8 if n < 2**18 else 16

    def segments(self, n: int, dim: int, whole: bool) -> Segments:
        """Of the backward over ``n`` sorted lookups; ``whole``: a block must hold whole rows.

        One warp: its rows wait for nobody else's. Programs for a few rounds of what runs at a time, so that none waits
        long for the last; not one a block: to start one takes as long as some of these need.
        """
        block_d = self._columns(dim, whole)
        pieces = max(self.replayed // block_d, 1)
        return Segments(pieces, block_d, min(cdiv(n, pieces), self.multiprocessors * self.resident), Warps(1))

    def stitch(self, n: int, dim: int, whole: bool) -> Stitch:
        """Of the rows of several pieces, which are ``n`` at most."""
        stitched = max(min(self.stitched, 2048 // self._columns(dim, whole)), 1)
        return Stitch(stitched, min(n, max(self.multiprocessors * self.resident // 4, 1)), Warps(4))

    def _columns(self, dim: int, whole: bool) -> int:
        return power_of_two(dim) if whole else min(power_of_two(dim), self.max_block_d)

    def update(self, n: int, dim: int, whole: bool) -> Replay:
        """Of an optimizer step of ``n`` rows ``dim`` wide; ``whole``: a block must hold whole rows.

        A block has one warp, which waits for nobody else's rows, and four numbers a thread, whose chains of operations
        run side by side.
        """
        block_d = self._columns(dim, whole)
        block_r = max(self.replayed // block_d, 1)
        return Replay(
            max(self.gathered if n >= 2**17 else self.gathered // 4, block_r),
            block_r,
            block_d,
            Warps(1, contract=False),
        )

    def tiny(self, n_rows: int, dim: int, exact: bool) -> Tiny:
        """Of the backward of tiny tables over a batch of ``n_rows``; ``exact``: its gradient is of bf16 already."""
        block_d = min(power_of_two(dim, 16), 64)
        block_b = max(self.elements // block_d // (1 if exact else 2), 16)
        return Tiny(self.sliced, block_b, block_d, max(2 * block_b, cdiv(n_rows, self.tiny_runs)), Warps(1))


EMBEDDING = EmbeddingConfig()


@dataclass(frozen=True)
class Gemm:
    """A tile of a product: ``block_m`` by ``block_n``, ``block_k`` of the summed axis at a time."""

    block_m: int
    block_n: int
    block_k: int
    warps: Warps


@dataclass(frozen=True)
class Rows:
    """A block of batch rows times units; ``run`` rows a program where it leaves sums behind; ``blocks`` of them are
    asked for before one is worked on."""

    block_b: int
    block_h: int
    run: int
    warps: Warps
    blocks: int = 1


@dataclass(frozen=True)
class Reduction:
    """A block of pieces times columns."""

    block_r: int
    block_c: int
    warps: Warps


@dataclass(frozen=True)
class Folded:
    """A tile of batch rows in inference, ``chunk`` units of the first hidden layer at a time; ``resident``: the tile's
    input stays where the products read it, else ``block_k`` of its columns are read at a time; ``fused``: experts and
    mixture in one launch; ``held``: a resident input of 16 bits stays in registers, not in shared memory."""

    block_m: int
    chunk: int
    block_k: int
    resident: bool
    fused: bool
    warps: Warps
    held: bool = False


@dataclass(frozen=True)
class Losses:
    """A block of batch rows, ``run`` rows a program, and how many of the pieces that they leave are added at once."""

    block_b: int
    run: int
    pieces: int
    warps: Warps


@dataclass(frozen=True)
class ExpertGateConfig:
    """Choices of expert_gate.

    Args:
        cap: no side of a block is larger; lowered by tests, which have more than one tile at tiny shapes then.
    """

    cap: int = 1 << 30

    def pieces(self, n_rows: int, pitch: int) -> Rows:
        """Of the statistics' pieces of a buffer ``[n_rows, pitch]``: a vector of 16 bytes a thread and block; narrow
        buffers in narrower blocks, so that they too fill the machine."""
        block_h = min(power_of_two(pitch, 16), 128)
        while block_h > 32 and cdiv(pitch, block_h) * PIECES < 3 * PROGRAMS:
            block_h //= 2
        return self._streamed(n_rows, cdiv(pitch, block_h), block_h, 4, 30, 1)

    def back(self, n_rows: int, units: int, n_experts: int) -> Rows:
        """Of the sums of D under activations that look at each unit alone."""
        block_h = min(power_of_two(units, 16), 128)
        return self._streamed(n_rows, n_experts * cdiv(units, block_h), block_h, 2, 26, 3)

    def _streamed(self, n_rows: int, columns: int, block_h: int, blocks: int, resident: int, stages: int) -> Rows:
        """Of sums over a buffer of so many ``columns`` of blocks: runs so long that all programs are ``resident`` on a
        multiprocessor at the same time, since one that begins or ends reads nothing meanwhile; of one warp, which waits
        for no other. With more than one of the ``stages`` blocks are read through shared memory, that many turns of the
        loop less one ahead."""
        block_b = max(min(256 // block_h, self.cap // blocks), 1)
        run = max(cdiv(n_rows * columns, resident * PROGRAMS), cdiv(n_rows, PIECES))
        return Rows(block_b, block_h, round_up(run, blocks * block_b), Warps(1, stages), blocks)

    def columns(self, n_rows: int, pitch: int, units: int, elements: int) -> Rows:
        """Of passes over a layer's buffers ``[n_rows, pitch]`` in blocks of at most ``units`` columns and about so many
        elements: runs short enough for every multiprocessor to have several."""
        block_h = min(power_of_two(units, 16), 128)
        block_b = min(elements // block_h, self.cap)
        run = n_rows * cdiv(pitch, block_h) // (8 * PROGRAMS)
        return Rows(block_b, block_h, min(max(power_of_two(run), 2 * block_b), max(512, 2 * block_b)), Warps(4))

    def wgrad(self, width: int, n_in: int) -> Gemm:
        """Of a split product for weights ``[width, n_in]``."""
        m, n = (min(power_of_two(side, 16), 128, max(self.cap, 16)) for side in (width, n_in))
        return Gemm(m, n, min(64, max(self.cap, 16)), Warps(8 if m * n >= 128 * 128 else 4, 3))

    def split_rows(self, n_rows: int, n_tiles: int, block_k: int, pitch: int) -> int:
        """Batch rows of one split, so that ``n_tiles`` fill the machine about twice, and rows ``pitch`` elements apart
        are found by offsets of 32 bits."""
        splits = min(max(2 * PROGRAMS // n_tiles, 1), cdiv(n_rows, 4 * block_k))
        splits = max(splits, cdiv(n_rows * pitch, 2**30))
        return round_up(cdiv(n_rows, splits), block_k)

    def reduction(self, n_pieces: int) -> Reduction:
        """Of ``n_pieces`` that a pass leaves: a block holds all of them (two sizes only, each of which is compiled)."""
        assert n_pieces <= PIECES, n_pieces
        return Reduction(64, 16, Warps(4)) if n_pieces <= 64 else Reduction(PIECES, 16, Warps(8))

    def softmax(self, columns: int, n_rows: int) -> Rows:
        """Of the backward of a gate over ``columns`` (a power of two) experts and ``n_rows`` of the batch."""
        block_b = min(max(512 // columns, 1), 64, self.cap)
        return Rows(block_b, columns, self._run(n_rows, 1, block_b), Warps(4))

    def _run(self, n_rows: int, programs: int, block_b: int) -> int:
        """Rows of a program that leaves sums behind, ``programs`` of them side by side, in multiples of ``block_b``:
        enough to fill the machine eight times over, and at most PIECES to add up."""
        run = min(cdiv(n_rows * programs, 8 * PROGRAMS), min(256, 2 * self.cap))
        return round_up(max(run, cdiv(n_rows, PIECES), 1), block_b)

    def folded(self, precision: str, generation: int, width_in: int, first: int, last: int) -> Folded:
        """Of inference: of experts that read ``width_in`` columns (a multiple of 16) and have hidden layers of
        ``first`` (or none) and ``last`` units, on a GPU of that generation.

        Only Hopper has the registers for tiles of 128 rows, and for experts and mixture in one launch.
        """
        chunk = min(64, first or 64, 2 * self.cap)
        tiles = {8: ((64, 64), (32, 32)), 9: ((128, 64), (64, 64), (64, 32)), 10: ((64, 32),)}
        if precision == "bf16" and self.cap > 64:
            for m, c in tiles.get(generation, tiles[8]):
                shared = 2 * (m * width_in + 2 * min(c, chunk) * (width_in + last))
                most = 64 * 128 if generation == 10 else 128 * 128
                if shared < self._shared(generation) and m * last <= most:
                    return Folded(m, min(c, chunk), 64, True, m == 128, Warps(8, 2))
        m = min(64 if last <= 128 or generation == 10 else 32, self.cap)
        k = min(64 if precision == "bf16" else 32, self.cap)
        return Folded(m, min(32, chunk), k, False, self.cap <= 64, Warps(8, 2))

    def folded_mix(self, precision: str, generation: int, last: int) -> Folded:
        """Of the mixture in a launch of its own."""
        m = 64 if last <= (32 if generation == 8 else 128) else 32
        k = 64 if precision == "bf16" else 32
        return Folded(min(m, self.cap), 16, min(k, self.cap), False, False, Warps(4 if last <= 32 else 8, 2))

    @staticmethod
    def _shared(generation: int) -> int:
        """Bytes of shared memory that a program may take for its blocks."""
        return 225 << 10 if generation in (9, 10) else 96 << 10

    def losses(self, n_rows: int) -> Losses:
        """Of the tasks' losses over a batch of ``n_rows``: a program for each multiprocessor at most."""
        block = min(512, self.cap)
        return Losses(block, round_up(max(cdiv(n_rows, PROGRAMS), 1), block), min(128, self.cap), Warps(4))

    def mix(self, n_rows: int, units: int, whole: bool, dropped: bool, gates: int) -> Rows:
        """Of the mixture of ``n_rows`` for ``gates`` gates, a sum of each in registers; ``whole``: blocks hold all
        units of an expert; ``dropped``: some are dropped, which takes registers, too."""
        block_h = self._units(units, whole)
        warps = 8 if n_rows < 16384 else 4
        elements = max(2048 * warps // max(power_of_two(gates), 8) // (1 + (whole or dropped)), 512)
        return Rows(min(max(elements // block_h, 1), 32, self.cap), block_h, 0, Warps(warps), 2)

    def tail(self, units: int, whole: bool, n_rows: int, n_experts: int, mixed: bool) -> tuple[Rows, int]:
        """Of the first pass back through the last hidden layer, over ``n_rows`` of the batch, and the experts of a
        block; ``whole``: blocks hold all units of an expert; ``mixed``: under gates, whose gradients are the same for
        all experts: a row of them is read once for those of a block."""
        block_h = self._units(units, whole)
        block_b = min(max(1024 // block_h, 1), 32, self.cap)
        together = min(alignment(n_experts, most=4), block_b) if mixed else 1
        programs = n_experts // together * cdiv(units, block_h)
        return Rows(block_b, block_h, self._run(n_rows, programs, block_b // together), Warps(4)), together

    def mixed_dz(self, units: int, n_rows: int, n_experts: int) -> tuple[Rows, int]:
        """Of dz from the mixtures' gradients, and the experts of a block: as :meth:`tail`'s, but that no sums are
        left, so that any number of programs may share the batch."""
        tail, together = self.tail(units, False, n_rows, n_experts, True)
        rows = tail.block_b // together
        programs = n_experts // together * cdiv(units, tail.block_h)
        run = min(max(n_rows * programs // (16 * PROGRAMS), 4 * rows), 256)
        return Rows(tail.block_b, tail.block_h, round_up(min(run, max(2 * self.cap, rows)), rows), Warps(4)), together

    def rows(self, units: int, whole: bool, dropped: bool, backward: bool = False) -> Rows:
        """Of experts without gates, and of those without hidden layers; ``whole``: blocks hold all units of an expert;
        ``dropped``: some are dropped. Both take registers, and so does the backward."""
        block_h = self._units(units, whole)
        elements = 8192 // (1 + backward) // (1 + (whole or dropped))
        return Rows(min(max(elements // block_h, 1), 32, self.cap), block_h, min(256, 2 * self.cap), Warps(4))

    def _units(self, units: int, whole: bool) -> int:
        """Of a block that holds all of an expert's, or those that a warp reduces without the others."""
        return power_of_two(units, 4) if whole else min(power_of_two(units, 4), 128, self.cap)


EXPERT_GATE = ExpertGateConfig()


@dataclass(frozen=True)
class Cut:
    """Words that a program writes: ``least`` to ``most``, so that all programs, ``resident`` of them a multiprocessor,
    are on the machine at once where that can be. Each word is a wait for its row's number and one for itself, and a
    program waits for all of its words at the same time."""

    least: int
    most: int
    resident: int
    warps: Warps

    def block(self, n_words: int) -> int:
        """For so many words."""
        return min(self.most, power_of_two(cdiv(n_words, self.resident * PROGRAMS), self.least))


#: Of the dense parameters' step: few programs for a million of them, since each first looks for its tensor.
DENSE_STEP = Elements(1024, Warps(4, contract=False))
#: Of the weights' copies for products.
OPERANDS = Elements(1024, Warps(4))
#: Of a batch that is cut. 2,048 words of four warps are 16 a lane: 8 KiB on their way in a program, 64 in eight.
CUT = Cut(512, 2048, 8, Warps(4))
