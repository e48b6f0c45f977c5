"""fastmtl: multi-task recommender models with torch-rechub's API and batched, fused kernels."""

from .backend import use_backend
from .models import from_pretrained

__version__ = "0.1.0"
__all__ = ["__version__", "from_pretrained", "use_backend"]
