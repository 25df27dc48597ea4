"""Rewards by name, and whatever else one may be given as."""

import importlib
from collections.abc import Mapping

from ..naming import unknown_name
from .base import CallableReward, Reward, RewardFunction, WeightedSum

REMOTE = "remote://"

_NAMED = {
    "incompressibility": "jpeg:Incompressibility",
    "compressibility": "jpeg:Compressibility",
    "brightness": "pixels:Brightness",
    "emoji_alignment": "emoji_alignment:EmojiAlignment",
    "aesthetic": "aesthetic:Aesthetic",
    "clip_score": "clip:ClipScore",
    "pick_score": "clip:PickScore",
    "hps_v2": "hps_v2:HPSv2",
    "image_reward": "image_reward:ImageReward",
    "prompt_alignment": "prompt_alignment:PromptAlignment",
    "strict_vqa": "strict_vqa:StrictVQA",
    "vlm_judge": "vlm_judge:VLMJudge",
}


def reward_class(name: str) -> type[Reward]:
    """Return the class of a reward that has a name.

    Raises:
        ValueError: the name is not known.
    """
    if name not in _NAMED:
        raise ValueError(unknown_name("reward", name, _NAMED))
    module, _, class_name = _NAMED[name].partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), class_name)


def make_reward(reward: str | Reward | RewardFunction | Mapping[str, float]) -> Reward:
    """Return a reward.

    Args:
        reward: A name ("incompressibility", "aesthetic", …: the README's table has them all), the address of a reward
            server ("remote://host:port"), a `Reward`, a callable `f(images [B, 3, H, W], prompts, metadata) -> [B]`, or
            {name: weight} for a weighted sum.

    Raises:
        ValueError: a name is not known, or `reward` is none of these.
    """
    if isinstance(reward, Reward):
        return reward
    if isinstance(reward, str):
        if reward.startswith(REMOTE):
            return importlib.import_module(".remote", __package__).RemoteReward(reward)
        return reward_class(reward)()
    if isinstance(reward, Mapping):
        if not reward:
            raise ValueError("a weighted sum of rewards needs at least one {name: weight}, got an empty mapping")
        return WeightedSum([(make_reward(name), float(weight)) for name, weight in reward.items()])
    if callable(reward):
        return CallableReward(reward)
    raise ValueError(f"reward must be a name, a Reward, a callable or {{name: weight}}, got {reward!r}")
