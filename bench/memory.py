"""Peak memory of a process that trains one contender for some steps.

python -m bench.memory --contender "fastmtl native" --shape ali-ccp
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import re
import warnings
from pathlib import Path

from bench.contenders import PEER, Setting, contenders
from bench.models import MODELS
from bench.shapes import SHAPES


def peak_bytes() -> int:
    """This process's peak resident memory. (getrusage's would contain the parent's, from before exec.)"""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise SystemExit("this kernel does not say what a process's peak memory is")
    return 1024 * int(found.group(1))


def main() -> None:
    """Train, print the peak in bytes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contender", default=PEER)
    parser.add_argument("--shape", choices=SHAPES, default="ali-ccp")
    parser.add_argument("--model", choices=MODELS, default="mmoe")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    shape = SHAPES[args.shape]
    runs, missing = contenders()
    chosen = next((one for one in runs if one.name == args.contender), None)
    if chosen is None:
        raise SystemExit(f"no contender {args.contender!r}: {missing.get(args.contender, 'not known')}")
    setting = Setting(shape, args.model, shape.batch_size, n_batches=1)
    runner = chosen.make(setting)
    setting.state = {}  # a user has no second copy of the weights
    for _ in range(args.steps):
        runner.step()
    runner.close()
    print(peak_bytes())


if __name__ == "__main__":
    main()
