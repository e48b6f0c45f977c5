"""What must never go wrong, for the CPU engine: a sample of each property in the tests, all of it in `make soak`."""
