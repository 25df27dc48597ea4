"""Diffusion models behind one contract, and the way to load them."""

from .base import Conditioning, DiffusionModel, Prediction, load_model

__all__ = ["Conditioning", "DiffusionModel", "Prediction", "load_model"]
