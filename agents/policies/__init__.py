"""Policies: what is optimised."""

from .base import Distribution, Policy
from .denoising import DenoisingPolicy

__all__ = ["DenoisingPolicy", "Distribution", "Policy"]
