"""fastmtl: multi-task recommender models with torch-rechub's API and batched, fused kernels."""
