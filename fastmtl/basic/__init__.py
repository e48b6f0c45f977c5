"""Features, layers and losses that models are put together from."""
