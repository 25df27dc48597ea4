"""Rewards of finished images: by name, any callable, or a weighted sum."""

from .base import CallableReward, Reward, RewardOutput, WeightedSum, make_reward, to_uint8

__all__ = ["CallableReward", "Reward", "RewardOutput", "WeightedSum", "make_reward", "to_uint8"]
