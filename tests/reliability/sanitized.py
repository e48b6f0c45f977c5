"""Loads the sanitizers' build in place of fastmtl's library: a plugin of pytest, or `python -m` around the fuzzer."""

import sys

from reliability.sanitize import use_sanitized_library

use_sanitized_library()

if __name__ == "__main__":
    from reliability import fuzz

    fuzz.main(*map(int, sys.argv[1:4]), sys.argv[4])
