"""Predictions of a trained model, as fast as the machine allows."""

from .predictor import Predictor

__all__ = ["Predictor"]
