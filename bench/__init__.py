"""Benchmarks: each checks equality before it times, and alternates its contenders in one run."""
