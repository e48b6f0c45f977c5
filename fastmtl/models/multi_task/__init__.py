"""Multi-task models: one class a file."""

from .aitm import AITM
from .base import MTLModel
from .esmm import ESMM
from .mmoe import MMOE
from .ple import PLE
from .pretrained import from_pretrained
from .shared_bottom import SharedBottom

MMoE = MMOE

__all__ = ["AITM", "ESMM", "MMOE", "PLE", "MMoE", "MTLModel", "SharedBottom", "from_pretrained"]
