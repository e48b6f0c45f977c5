"""What fastmtl does where torch-rechub 0.9.0 is wrong, and scripts that must run: see docs/differences.md."""
