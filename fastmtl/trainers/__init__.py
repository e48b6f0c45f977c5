"""Training and evaluation."""

from .evaluation import evaluate_multi_task
from .mtl_trainer import MTLTrainer

__all__ = ["MTLTrainer", "evaluate_multi_task"]
