"""fastmtl against torch-rechub 0.9.0: same seed, same weights, same numbers."""
