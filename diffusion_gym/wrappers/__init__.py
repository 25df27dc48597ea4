"""Wrappers of vector environments, beside Gymnasium's own: these keep tensors on their device."""

from .arrays import NumpyToTorch, TorchToNumpy
from .episode_statistics import EpisodeStatistics
from .prediction_action import PredictionAction
from .shaping import PotentialShaping, PredictedReward

__all__ = [
    "EpisodeStatistics",
    "NumpyToTorch",
    "PotentialShaping",
    "PredictedReward",
    "PredictionAction",
    "TorchToNumpy",
]
