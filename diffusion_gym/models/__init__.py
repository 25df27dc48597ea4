"""Diffusion models behind one contract, and the way to load them."""

from .base import Conditioning, DiffusionModel, Prediction, checked_guidance_scale
from .loading import load_model

__all__ = ["Conditioning", "DiffusionModel", "Prediction", "checked_guidance_scale", "load_model"]
