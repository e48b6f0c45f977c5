"""The models. ``from fastmtl.models import *`` gives them under the library's and the tutorial's names."""

from .multi_task import AITM, ESMM, MMOE, PLE, MMoE, SharedBottom, from_pretrained

__all__ = ["AITM", "ESMM", "MMOE", "PLE", "MMoE", "SharedBottom", "from_pretrained"]
