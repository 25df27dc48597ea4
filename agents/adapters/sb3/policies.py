"""Our policies as Stable-Baselines3's, each with a critic."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, get_args

import numpy as np
import torch
from gymnasium.spaces import Box, Space
from stable_baselines3.common.distributions import Distribution as SB3Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import get_device
from torch import Tensor, nn

from diffusion_gym import transfer
from diffusion_gym.checks import checked_number
from diffusion_gym.models.base import DiffusionModel
from diffusion_gym.models.loading import load_model
from diffusion_gym.samplers import Sampler
from diffusion_gym.transitions import Reduction

from ...critic import ValueNetwork
from ...policies import Adaptation, DenoisingPolicy, Distribution, Full, Policy, TimePredictor

Schedule = Callable[[float], float]


class _ActorCriticPolicy(ActorCriticPolicy):
    """SB3's policy around one of ours, with a critic of its own: what both concrete ones share.

    Draws come from torch's generator, which SB3's `seed=` seeds. A zip holds what is trained, and nothing frozen.

    Attributes:
        actor: The policy, which does all that concerns actions.
        critic: The value function.
        log_prob_reduction: "mean" or "sum".
    """

    def __init__(
        self,
        observation_space: Space,
        action_space: Box,
        lr_schedule: Schedule,
        *,
        make_actor: Callable[[int], Policy],
        arguments: Mapping[str, Any],
        log_prob_reduction: Reduction,
        precision: torch.dtype | None,
        use_sde: bool,
        critic_width: int,
        critic_speed: float,
        optimizer_class: type[torch.optim.Optimizer],
        optimizer_kwargs: dict[str, Any] | None,
    ) -> None:
        if use_sde:
            raise ValueError("use_sde=True explores by noise of SB3's own; here the sampler's is all: leave it out")
        if log_prob_reduction not in get_args(Reduction):
            raise ValueError(f"log_prob_reduction must be one of {get_args(Reduction)}, got {log_prob_reduction!r}")
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )
        critic = {
            "critic_width": critic_width,
            "critic_speed": checked_number("critic_speed", critic_speed, "(0, inf)"),
        }
        optimizer = {"optimizer_class": optimizer_class, "optimizer_kwargs": optimizer_kwargs}
        self._arguments = {**arguments, **critic, **optimizer}
        self.log_prob_reduction = log_prob_reduction
        self._precision = precision
        self.actor = make_actor(int(torch.randint(2**31, ())))
        self.critic = ValueNetwork(observation_space, width=critic_width, seed=int(torch.randint(2**31, ())))
        self.actor.check_fit(observation_space, action_space)
        if self.actor.needs_loss_scaling:
            raise ValueError(
                "fp16's small gradients vanish unless the loss is scaled, and SB3 does not scale losses: take "
                'precision="bf16", or float32 weights'
            )
        trained = [parameter for parameter in self.actor.parameters() if parameter.requires_grad]
        groups = [{"params": trained, "speed": 1.0}, {"params": [*self.critic.parameters()], "speed": critic_speed}]
        self.optimizer = optimizer_class(groups, lr=lr_schedule(1.0), **self.optimizer_kwargs)  # type: ignore[call-arg]
        self.optimizer.register_step_pre_hook(_speed_up)
        self.optimizer.register_step_post_hook(_slow_down)
        self._register_state_dict_hook(_without_frozen)
        self.register_load_state_dict_pre_hook(_with_frozen)

    def _build(self, lr_schedule: Schedule) -> None:
        """Build nothing: none of SB3's networks is used."""

    def _get_constructor_parameters(self) -> dict[str, Any]:
        spaces = {"observation_space": self.observation_space, "action_space": self.action_space}
        return {**spaces, "lr_schedule": self._dummy_schedule, **self._arguments}

    def forward(self, obs: Mapping[str, Tensor], deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Return actions [B, …], values [B, 1] and log-probs [B]."""
        actions, log_prob = self.actor.sample(
            self._checked(obs),
            generators=torch.default_generator,
            deterministic=deterministic,
            reduction=self.log_prob_reduction,
            precision=self._precision,
        )
        return actions, self.predict_values(obs), log_prob

    def evaluate_actions(self, obs: Mapping[str, Tensor], actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Return values [B, 1], log-probs [B] and entropies [B], reduced as the log-probs are."""
        distribution = self.get_distribution(obs)
        return self.predict_values(obs), distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: Mapping[str, Tensor]) -> "ActorDistribution":  # type: ignore[override]
        """Return the distribution of the actions."""
        distribution = self.actor.distribution(self._checked(obs))
        return ActorDistribution(distribution, self.action_space.shape or (), self.log_prob_reduction)

    def predict_values(self, obs: Mapping[str, Tensor]) -> Tensor:  # type: ignore[override]
        """Return the values of states, [B, 1]."""
        return self.critic(obs)[:, None]

    def _predict(self, observation: Mapping[str, Tensor], deterministic: bool = False) -> Tensor:  # type: ignore[override]
        return self.actor.act(
            self._checked(observation),
            generators=torch.default_generator,
            deterministic=deterministic,
            precision=self._precision,
        )

    def _checked(self, obs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        device = obs["timestep"].device
        if not transfer.is_same_device(device, self.actor.device):
            raise ValueError(
                f"the algorithm is on {device}, its actor on {self.actor.device}: give both the same, device=… of the "
                "algorithm and of policy_kwargs"
            )
        return obs


def _speed_up(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    """Give each group its own learning rate for a step: SB3 sets one for all of them."""
    for group in optimizer.param_groups:
        group["lr"] *= group["speed"]


def _slow_down(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    for group in optimizer.param_groups:
        group["lr"] /= group["speed"]


def _frozen(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.named_parameters() if not value.requires_grad}


def _without_frozen(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    for name in _frozen(module):
        del state[prefix + name]


def _with_frozen(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
    state.update({prefix + name: value for name, value in _frozen(module).items()})


class ActorDistribution(SB3Distribution):
    """One of our distributions as SB3's.

    Args:
        distribution: The distribution.
        action_shape: The shape of one action; SB3 flattens what it keeps.
        reduction: How log-probs and entropies are reduced over it.
    """

    def __init__(self, distribution: Distribution, action_shape: tuple[int, ...], reduction: Reduction) -> None:
        super().__init__()
        self.ours = distribution
        self._action_shape, self._reduction = action_shape, reduction

    def proba_distribution_net(self, *args: object) -> nn.Module:
        """Raise: the networks are the actor's own."""
        raise NotImplementedError("the networks are the actor's own")

    def proba_distribution(self, *args: object) -> "ActorDistribution":
        """Return it as it is."""
        return self

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log-probs of actions [B, …], flattened or not, [B]."""
        return self.ours.log_prob(x.reshape(-1, *self._action_shape), self._reduction)

    def entropy(self) -> Tensor:
        """Return the entropies, [B]."""
        entropy = self.ours.entropy()
        return entropy / np.prod(self._action_shape).item() if self._reduction == "mean" else entropy

    def sample(self) -> Tensor:
        """Return a draw, [B, …]."""
        return self.ours.sample(torch.default_generator)

    def mode(self) -> Tensor:
        """Return the most probable actions, [B, …]."""
        return self.ours.mode

    def actions_from_params(self, *args: object) -> Tensor:
        """Return a draw."""
        return self.get_actions()

    def log_prob_from_params(self, *args: object) -> tuple[Tensor, Tensor]:
        """Return a draw and its log-probs."""
        actions = self.get_actions()
        return actions, self.log_prob(actions)


class DenoisingActorCriticPolicy(_ActorCriticPolicy):
    """SB3's policy for DenoisingMDP-v0: the actor is a `DenoisingPolicy`, so the denoiser itself is trained.

    The standard deviation is the sampler's and is not learnt; dropout is off at all times; steps without a density,
    such as the one to the clean end, have the log-prob 0 and teach nothing.

    Args:
        observation_space: Given by SB3.
        action_space: Given by SB3.
        lr_schedule: Given by SB3.
        use_sde: Given by SB3; it has to be False.
        model: A name, a folder, a Hub id, or a loaded model, `env.model`: this takes no memory twice, and of it too
            a zip holds only the folder. Whoever loads the zip needs the model where it was.
        sampler: As in `DenoisingPolicy`.
        adaptation: As in `DenoisingPolicy`; with `LoRA()` a zip holds the adapter alone.
        guidance_scale: As in `DenoisingPolicy`.
        precision: As in `DenoisingPolicy`, but for "fp16": SB3 does not scale losses.
        gradient_checkpointing: As in `DenoisingPolicy`.
        prompts: As in `DenoisingPolicy`.
        negative_prompt: As in `DenoisingPolicy`.
        log_prob_reduction: "mean" over the latents' dimensions, as the published DDPO codes do, with a clip range of
            1e-4; "sum", the density's own, diverges at once unless latents are few.
        device: Where a model that is given by its name is loaded; "auto" as in SB3.
        critic_width: Of the `ValueNetwork`'s layers.
        critic_speed: The critic's learning rate over the actor's, which SB3 has one for.
        optimizer_class: A torch optimizer.
        optimizer_kwargs: Its keywords; None: SB3's, for Adam an ε of 1e-5. That is larger than most gradients of a
            mean log-prob, so that steps follow the gradient and not its signs: a learning rate of 3e-4 is moderate.

    Raises:
        TypeError, ValueError: an argument is out of its range or of the wrong kind, or does not fit the spaces.
    """

    def __init__(
        self,
        observation_space: Space,
        action_space: Box,
        lr_schedule: Schedule,
        use_sde: bool = False,
        *,
        model: str | PathLike[str] | DiffusionModel,
        sampler: Sampler | None = None,
        adaptation: Adaptation = Full(),
        guidance_scale: float | None = None,
        precision: Literal["bf16", "auto"] | None = None,
        gradient_checkpointing: bool = False,
        prompts: Sequence[str] = (),
        negative_prompt: str = "",
        log_prob_reduction: Reduction = "mean",
        device: str | torch.device = "auto",
        critic_width: int = 64,
        critic_speed: float = 10.0,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        loaded = model if isinstance(model, DiffusionModel) else load_model(model, device=get_device(device))

        actor: dict[str, Any] = {
            "sampler": sampler,
            "adaptation": adaptation,
            "guidance_scale": guidance_scale,
            "precision": precision,
            "gradient_checkpointing": gradient_checkpointing,
            "prompts": prompts,
            "negative_prompt": negative_prompt,
        }
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            make_actor=lambda seed: DenoisingPolicy(loaded, **actor, seed=seed),
            arguments={"model": model, **actor, "log_prob_reduction": log_prob_reduction, "device": device},
            log_prob_reduction=log_prob_reduction,
            precision=loaded.dtype,
            use_sde=use_sde,
            critic_width=critic_width,
            critic_speed=critic_speed,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )


class TimePredictionActorCriticPolicy(_ActorCriticPolicy):
    """SB3's policy for TimePredictionMDP-v0: the actor is a `TimePredictor`.

    Args:
        observation_space: Given by SB3.
        action_space: Given by SB3.
        lr_schedule: Given by SB3.
        use_sde: Given by SB3; it has to be False.
        hidden_channels: As in `TimePredictor`.
        initial_ratio: As in `TimePredictor`.
        initial_concentration: As in `TimePredictor`.
        device: Where the predictor is made; "auto" as in SB3.
        critic_width: Of the `ValueNetwork`'s layers.
        critic_speed: The critic's learning rate over the actor's, which SB3 has one for.
        optimizer_class: A torch optimizer.
        optimizer_kwargs: Its keywords; None: SB3's.

    Raises:
        TypeError, ValueError: an argument is out of its range or of the wrong kind, or does not fit the spaces.
    """

    def __init__(
        self,
        observation_space: Space,
        action_space: Box,
        lr_schedule: Schedule,
        use_sde: bool = False,
        *,
        hidden_channels: int | None = None,
        initial_ratio: float | Mapping[float, float] = 0.7,
        initial_concentration: float = 16.0,
        device: str | torch.device = "auto",
        critic_width: int = 64,
        critic_speed: float = 1.0,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        actor: dict[str, Any] = {
            "hidden_channels": hidden_channels,
            "initial_ratio": initial_ratio,
            "initial_concentration": initial_concentration,
        }
        place = get_device(device)
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            make_actor=lambda seed: TimePredictor(observation_space, **actor, device=place, seed=seed),
            arguments={**actor, "device": device},
            log_prob_reduction="sum",
            precision=None,
            use_sde=use_sde,
            critic_width=critic_width,
            critic_speed=critic_speed,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )
