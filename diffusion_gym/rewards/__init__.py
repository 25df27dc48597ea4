"""Rewards of finished images: named ones, callables, weighted sums, compositions and servers' rewards."""

from .base import CallableReward, Reward, RewardOutput, to_uint8
from .compositions import Cached, Retry, Threshold, Timed
from .names import WeightedSum, make_reward
from .normalised import Normalised

__all__ = [
    "Cached",
    "CallableReward",
    "Normalised",
    "Retry",
    "Reward",
    "RewardOutput",
    "Threshold",
    "Timed",
    "WeightedSum",
    "make_reward",
    "to_uint8",
]
