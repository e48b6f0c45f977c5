"""What must never go wrong, at length: one line a property, the seed first.

    make soak                                   # everything, an hour or so
    make soak ARGS="--row 1 --count 2000"       # one property, so many cases
    make soak ARGS="--row 9 --seed 7"           # a run that is repeated
    make soak ARGS="--device cuda"              # the rows that a GPU has, on its backends

The numbers are those of docs/reliability.md, which says what each property is and how many cases are a full run.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Callable

import torch

#: row -> (property, cases of a full run, what runs them on the CPU)
ROWS: dict[int, tuple[str, int, str]] = {
    1: ("forward and backward against float64", 20_000, "against_float64"),
    2: ("gradients by finite differences, ops by opcheck", 200, "gradients"),
    4: ("the same weights from fresh processes", 12, "repeatability"),
    9: ("no access out of bounds, under the sanitizers", 1_000_000, "sanitize"),
    10: ("bad ids", 2_000, "bad_ids"),
    11: ("more than 2^31 elements", 3, "large"),
    15: ("16 threads predict what one does", 10_000, "threads"),
    16: ("no leaks", 100_000, "leaks"),
}
#: The rows that a GPU has. A configuration is a minute's worth of kernels to compile there: few are a full run.
ON_A_GPU: dict[int, tuple[int, str]] = {
    1: (500, "against_float64"),
    2: (50, "gradients"),
    4: (12, "repeatability"),
    9: (1, "sanitize_gpu"),
    10: (500, "bad_ids"),
    11: (1, "large"),
}


def main(argv: list[str] | None = None) -> int:
    """Run rows; the exit status is the number of rows that failed."""
    parser = argparse.ArgumentParser(prog="make soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--row", type=int, choices=ROWS, action="append", help="one row (repeatable); all without it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (%(default)s)")
    parser.add_argument("--count", type=int, help="cases of each row; a full run's without it")
    parser.add_argument("--seed", type=int, help="repeat a run; drawn without it")
    args = parser.parse_args(argv)
    os.environ["FASTMTL_TEST_DEVICE"] = args.device  # tests/devices.py reads it when it is imported
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    if on_gpu and args.row and not set(args.row) <= set(ON_A_GPU):
        parser.error(f"--device cuda: the rows there are {', '.join(map(str, ON_A_GPU))}")
    seed = int.from_bytes(os.urandom(4), "little") % 2**31 if args.seed is None else args.seed
    print(f"seed {seed}, torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    failed = 0
    for row in args.row or (ON_A_GPU if on_gpu else ROWS):
        what, count, name = ROWS[row]
        if on_gpu:
            count, name = ON_A_GPU[row]
        start = time.perf_counter()
        try:
            run: Callable[[int, int], str] = importlib.import_module(f"reliability.{name}").soak
            line = run(count if args.count is None else args.count, seed)
            state = "ok"
        except Exception as error:
            failed += 1
            state, line = "FAILED", f"{type(error).__name__}: {error}"
            traceback.print_exc(limit=-3)
        print(f"row {row:>2} {state:6} {what}: {line} [{time.perf_counter() - start:.0f} s]", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
