"""`make_reward`, which takes rewards by name and in other forms; and weighted sums of them."""

import importlib
import inspect
import math
from collections.abc import Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor
from typing_extensions import override

from ..naming import unknown_name
from .base import CallableReward, Metadata, Reward, RewardFunction, RewardOutput, check_reward, checked_output

REFERENCE_DISTANCE = "reference_distance"

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
        ValueError: the name is not known, or one of TimePredictionMDP-v0's own.
    """
    if name == REFERENCE_DISTANCE:
        raise ValueError(
            f"the reward {name!r} needs the noise that an image was made of: give it by itself, not as a part of "
            f'another reward, as reward="{name}" of TimePredictionMDP-v0'
        )
    if name not in _NAMED:
        raise ValueError(unknown_name("reward", name, _NAMED))
    module, _, class_name = _NAMED[name].partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), class_name)


def make_reward(
    reward: str | Reward | RewardFunction | Mapping[str, float], *, options: Mapping[str, object] | None = None
) -> Reward:
    """Return a reward that is ready for its first call (see `Reward.make_ready`).

    Args:
        reward: A name ("incompressibility", "aesthetic", …: the README's table has them all); "module:function", which
            is imported, for a function or a `Reward` of one's own; the address of a reward server
            ("remote://host:port", "https://…"); a `Reward`; a callable `f(images [B, 3, H, W], prompts, metadata) ->
            [B]`; or {name: weight} for a weighted sum.
        options: Keywords for the reward of a name: make_reward("clip_score", options={"device": "cuda:1"}).

    Raises:
        TypeError: a reward has no name, a function does not take (images, prompts, metadata), or `reward` is a class.
        ValueError: a name is not known, it takes no such options, or weights cannot be had.
        RuntimeError: a server cannot be reached.
    """
    ready_reward = _make(reward, {} if options is None else options)
    check_reward(ready_reward)
    ready_reward.make_ready()
    return ready_reward


def _make(reward: str | Reward | RewardFunction | Mapping[str, float], options: Mapping[str, object]) -> Reward:
    if isinstance(reward, str):
        return _from_text(reward, options)
    if options:
        raise ValueError(f"options are the keywords of a reward that is named, got {dict(options)} for {reward!r:.80}")
    if isinstance(reward, Reward):
        return reward
    if isinstance(reward, Mapping):
        return WeightedSum(reward)
    if isinstance(reward, type):
        raise TypeError(f"reward must not be a class, but one that was made of it: {reward.__name__}(...)")
    if callable(reward):
        return CallableReward(reward)
    raise ValueError(f"reward must be a name, a Reward, a callable or {{name: weight}}, got {reward!r:.80}")


def _from_text(text: str, options: Mapping[str, object]) -> Reward:
    kind = named_class(text)
    if kind is None:
        return _make(_imported(text), options)  # type: ignore[arg-type]
    keywords = {"url": text, **options} if "://" in text else dict(options)
    signature = inspect.signature(kind)
    try:
        signature.bind(**keywords)
    except TypeError as error:
        raise ValueError(f"{text} does not take these options: {error}; it is {text}{signature}") from None
    return kind(**keywords)


def named_class(text: str) -> type[Reward] | None:
    """Return the class of the reward that a name, an address or "module:class" stands for; None for a function.

    Raises:
        ValueError: it means nothing.
    """
    if "://" in text:
        return importlib.import_module(".remote", __package__).RemoteReward
    if ":" not in text:
        return reward_class(text)
    value = _imported(text)
    return value if isinstance(value, type) and issubclass(value, Reward) else None


def _imported(text: str) -> object:
    """Return the object that "module:name" names.

    Raises:
        ValueError: there is no such module, or nothing of that name in it.
    """
    module_name, _, path = text.partition(":")
    try:
        value: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and misses another one
        raise ValueError(
            f"the reward {text!r} is looked for in the module {module_name!r}, which Python does not find: start where "
            "its file is (python -m looks in the present folder), or name its folder in PYTHONPATH"
        ) from error
    for part in path.split("."):
        if part not in dir(value):
            raise ValueError(
                unknown_name(f"name in {module_name}", part, [name for name in dir(value) if name[0] != "_"])
            )
        value = getattr(value, part)
    return value


class WeightedSum(Reward):
    """Σ_i w_i·r_i over named rewards; every r_i is reported as an extra.

    Args:
        weighted: The rewards, or their sources for `make_reward`, each with its weight; or {name: weight}.

    Raises:
        ValueError: there is no reward, a weight is no finite number, two of the rewards have one name, or a name is
            not known.
    """

    def __init__(self, weighted: Mapping[str, float] | Sequence[tuple[str | Reward | RewardFunction, float]]) -> None:
        pairs = list(weighted.items() if isinstance(weighted, Mapping) else weighted)
        if not pairs:
            raise ValueError("a weighted sum of rewards needs at least one {name: weight}, got none")
        for reward, weight in pairs:
            if not isinstance(weight, Real) or not math.isfinite(weight):
                raise ValueError(f"the weight of the reward {reward!r} must be a finite number, got {weight!r}")
        self.weighted = tuple((make_reward(reward), float(weight)) for reward, weight in pairs)
        names = [reward.name for reward, _ in self.weighted]
        if len(set(names)) < len(names):
            raise ValueError(
                f"the rewards of a sum are reported by their names, which must differ, got {names}: "
                'give one of them another, reward.name = "..."'
            )
        self.name = "+".join(f"{weight:g}*{reward.name}" for reward, weight in self.weighted)
        units = {reward.unit for reward, _ in self.weighted}
        self.unit = units.pop() if len(units) == 1 else "mixed"
        bounds = [sorted(weight * bound for bound in reward.range) for reward, weight in self.weighted if weight]
        self.range = (sum(low for low, _ in bounds), sum(high for _, high in bounds))

    @override
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> RewardOutput:
        total = torch.zeros(len(images), device=images.device, dtype=torch.float32)
        extras: dict[str, Tensor] = {}
        for reward, weight in self.weighted:
            output = checked_output(reward, images, prompts, metadata)
            total = total + weight * output.values
            extras |= {**output.extras, reward.name: output.values}
        return RewardOutput(total, extras)

    @override
    def state_dict(self) -> dict[str, object]:
        states = [reward.state_dict() for reward, _ in self.weighted]
        return {"weighted": states} if any(states) else {}

    @override
    def load_state_dict(self, state: Mapping[str, object]) -> None:
        states = state.get("weighted", [{}] * len(self.weighted))
        if not isinstance(states, list) or len(states) != len(self.weighted) or state.keys() - {"weighted"}:
            raise ValueError(f"the state given is not that of {self.name!r}: it has {sorted(state)}")
        for (reward, _), reward_state in zip(self.weighted, states, strict=True):
            reward.load_state_dict(reward_state)
