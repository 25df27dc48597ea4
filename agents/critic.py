"""A value function of an episode's states: PPO's and DPOK's baseline."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box, Dict, Space
from torch import Tensor, nn

from diffusion_gym import transfer
from diffusion_gym.checks import checked_integer, checked_number

from .advantages import ROUNDING, Advantages, Episodes, Rewards, check_clip, clip_advantages, normalise
from .policies.base import Observation

_TIMES = ("timestep", "next_timestep", "step")
_FREQUENCIES = 4


class ValueNetwork(nn.Module):
    """V(s): what an episode will earn from a state of any of the environments, by a small network.

        h = [mean and deviation of each channel, cos(k·π·τ) for k = 1 … 4, prompt]
        V = Linear(SiLU(Linear(SiLU(Linear(h)))))

    The channels are those of the denoiser's features where they are observed, else those of the latents; τ in [0, 1]
    are the observed times; the prompt is the mean of its token embeddings, or where these are not observed a learned
    vector for each `prompt_id`. Channels and prompt are normalised (LayerNorm). V is 0 before training.

    Source: Fan et al., 2023 (DPOK), whose code has a value function for a baseline,
    https://arxiv.org/abs/2305.16381. Its layers are not followed here.

    Args:
        observation_space: The space of one lane, `env.single_observation_space`.
        width: Of the two hidden layers.
        seed: The seed of the first weights.

    Raises:
        TypeError: the space is not that of one lane of an environment of `diffusion_gym`.
        ValueError: `width` or `seed` is no whole number, or out of its range.
    """

    def __init__(self, observation_space: Space, *, width: int = 64, seed: int = 0) -> None:
        super().__init__()
        spaces = observation_space.spaces if isinstance(observation_space, Dict) else {}
        if not {"latents", "timestep", "prompt_id"} <= spaces.keys():
            raise TypeError(
                "observation_space must be that of one lane, env.single_observation_space with latents, timestep and "
                f"prompt_id; got {observation_space}"
            )
        width = checked_integer("width", width, at_least=1)
        generator = torch.Generator().manual_seed(checked_integer("seed", seed, at_least=0))
        self._picture = "features" if "features" in spaces else "latents"
        self._times = {key: _bounds(spaces[key]) for key in _TIMES if key in spaces}
        embeds = {key: (space.shape or ()) for key, space in spaces.items() if key.endswith("embeds")}
        self._embeds = sorted(key for key in embeds if not key.startswith("negative_"))
        num_channels = 2 * (spaces[self._picture].shape or ())[0]
        num_prompt = sum(embeds[key][-1] for key in self._embeds) or width
        self.picture_norm = nn.LayerNorm(num_channels)
        self.prompt_norm = nn.LayerNorm(num_prompt)
        self.table = None
        if not self._embeds:
            num_prompts = int(spaces["prompt_id"].high.item()) + 2  # type: ignore[attr-defined]  # −1 is one too
            self.table = nn.Embedding(num_prompts, width)
            self.table.weight.data.normal_(generator=generator)
        sizes = [num_channels + _FREQUENCIES * len(self._times) + num_prompt, width, width]
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        for layer in self.hidden:
            nn.init.xavier_uniform_(layer.weight, generator=generator)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.output = nn.Linear(width, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, observation: Observation) -> Tensor:
        """Return the values of states, [...] float32, for observations [..., *shape] of each key."""
        picture = observation[self._picture].float().flatten(-2)
        channels = torch.cat([picture.mean(-1), picture.std(-1, correction=0)], dim=-1)
        h = torch.cat([self.picture_norm(channels), self._time(observation), self._prompt(observation)], dim=-1)
        for layer in self.hidden:
            h = F.silu(layer(h))
        return self.output(h).squeeze(-1)

    def _time(self, observation: Observation) -> Tensor:
        waves = torch.arange(1, _FREQUENCIES + 1, device=observation["timestep"].device) * math.pi
        times = [(observation[key].float() - low) / (high - low) for key, (low, high) in self._times.items()]
        return torch.cat([(time * waves).cos() for time in times], dim=-1)

    def _prompt(self, observation: Observation) -> Tensor:
        if self.table is not None:
            return self.prompt_norm(self.table(observation["prompt_id"].squeeze(-1).long() + 1))
        embeds = [(observation[key].float(), key) for key in self._embeds]
        pooled = [value if key.startswith("pooled_") else value.mean(-2) for value, key in embeds]
        return self.prompt_norm(torch.cat(pooled, dim=-1))


def _bounds(space: Space) -> tuple[float, float]:
    assert isinstance(space, Box)
    return space.low.item(), space.high.item()


@final
class FittedCritic:
    """A value network that is fitted to the rewards of one rollout after another: the memory of `Critic`.

    Args:
        part: The part that it is of.
        network: The network that is fitted, on the states' device.

    Attributes:
        network: V is its output times the deviation of the first rollout's rewards, plus their mean.
    """

    def __init__(self, part: "Critic", network: ValueNetwork) -> None:
        self.network = network
        self._part = part
        self._optimizer = torch.optim.Adam(network.parameters(), lr=part.learning_rate)
        self._mean, self._deviation = 0.0, 1.0
        self._num_rollouts = 0

    def update(self, rewards: Tensor, episodes: Episodes) -> Tensor:
        """Return the values of all states that were acted in, [T, B] float32, 0 elsewhere; then fit to the rewards.

        The values are those *before* the fit: a baseline that had seen an action's reward would bias its gradient.

        Args:
            rewards: [B] what each episode earned.
            episodes: What was seen in them.
        """
        if not self._num_rollouts:
            self._set_scale(transfer.to_host(rewards[~rewards.isnan()]))
        steps, lanes = np.nonzero(episodes.scored)
        values = torch.zeros(episodes.scored.shape, device=rewards.device)
        with torch.no_grad():
            for step, lane in episodes.micro_batches(steps, lanes, self._part.batch_size):
                values[step, lane] = self._mean + self._deviation * self.network(episodes.observation(step, lane))
        self._fit((rewards - self._mean) / self._deviation, episodes, steps, lanes)
        return values

    def _set_scale(self, rewards: np.ndarray) -> None:
        self._mean, deviation = rewards.mean().item(), rewards.std().item()
        self._deviation = deviation if deviation > ROUNDING * abs(self._mean) else 1.0

    def _fit(self, targets: Tensor, episodes: Episodes, steps: np.ndarray, lanes: np.ndarray) -> None:
        rng = np.random.default_rng([self._part.seed, self._num_rollouts])
        self._num_rollouts += 1
        for _ in range(self._part.n_epochs):
            order = rng.permutation(len(steps))
            for step, lane in episodes.micro_batches(steps[order], lanes[order], self._part.batch_size):
                with torch.enable_grad():
                    loss = F.mse_loss(self.network(episodes.observation(step, lane)), targets[lane])
                self._optimizer.zero_grad()
                loss.backward()
                self._optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered beside tensors, as JSON can hold it."""
        return {"mean": self._mean, "deviation": self._deviation, "num_rollouts": self._num_rollouts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember what `state_dict` returned."""
        self._mean, self._deviation = state["mean"], state["deviation"]
        self._num_rollouts = state["num_rollouts"]

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of the network's weights and of the optimizer's averages, by name."""
        weights = {f"network.{name}": value.clone() for name, value in self.network.state_dict().items()}
        averages = {
            f"optimizer.{index}.{name}": torch.as_tensor(value).clone()
            for index, values in self._optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
        return weights | averages

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` returned."""
        weights: dict[str, Tensor] = {}
        averages: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            of, _, name = key.partition(".")
            if of == "network":
                weights[name] = value
            else:
                index, _, name = name.partition(".")
                averages.setdefault(int(index), {})[name] = value
        self.network.load_state_dict(weights)
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": averages})


@final
@dataclass(frozen=True)
class Critic(Advantages):
    """Rewards less what a value function expected of each state, normalised over the rollout's actions.

        A_t = (R − V(s_t)),  less their mean, over their standard deviation

    V is fitted to the rewards of each rollout once its advantages are known (PPO's, with γ = λ = 1: the reward comes at
    the end). It is saved with the run, which goes on with it exactly. For algorithms that learn from steps.

    Source: Schulman et al., 2017 (PPO), https://arxiv.org/abs/1707.06347; Fan et al., 2023 (DPOK),
    https://arxiv.org/abs/2305.16381.

    Args:
        width: Of the network's hidden layers, see `ValueNetwork`.
        learning_rate: Adam's.
        n_epochs: Passes over the states of a rollout.
        batch_size: States in an update of the critic.
        clip: Advantages are clamped to ±this; None: not at all.
        seed: Of the first weights and of the shuffles.

    Raises:
        TypeError, ValueError: a number is out of its range.
    """

    width: int = 64
    learning_rate: float = 3e-3
    n_epochs: int = 10
    batch_size: int = 32
    clip: float | None = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "n_epochs", "batch_size"):
            checked_integer(name, getattr(self, name), at_least=1)
        checked_integer("seed", self.seed, at_least=0)
        checked_number("learning_rate", self.learning_rate, "(0, inf)")
        check_clip(self.clip)

    @property
    def looks_at_states(self) -> bool:
        """At those of each episode."""
        return True

    def memory(self, observation_space: Space, device: torch.device) -> FittedCritic:
        """Return a critic that has seen nothing."""
        return FittedCritic(self, ValueNetwork(observation_space, width=self.width, seed=self.seed).to(device))

    def estimate(self, rewards: Rewards, memory: object) -> Tensor:
        """Return the advantage of each action, [T, B], 0 where none was scored; the memory is then fitted to them."""
        assert isinstance(memory, FittedCritic)
        assert rewards.episodes is not None
        scored = torch.from_numpy(rewards.episodes.scored).to(rewards.values.device)
        values = memory.update(rewards.values, rewards.episodes)
        advantages = torch.zeros_like(values)
        advantages[scored] = normalise((rewards.values - values)[scored])
        return clip_advantages(advantages, self.clip)
