"""TorchRL: an environment for its collectors, and our policies and critic as its modules.

    env = DiffusionTorchRLEnv(gym.make_vec("DenoisingMDP-v0", num_envs=32, num_steps=5, autoreset_mode="DISABLED"))
    actor = denoising_actor(DenoisingPolicy(env.model), env)
    critic = critic_of(ValueNetwork(env.env.single_observation_space), env)
    loss = ClipPPOLoss(actor, critic, clip_epsilon=1e-4, entropy_bonus=False)
    advantages = GAE(gamma=1.0, lmbda=1.0, value_network=critic)
    for batch in Collector(env, actor, frames_per_batch=160): ...

Everything stays on the environment's device. TorchRL renames things between releases: this goes with 0.14.
"""

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from gymnasium.spaces import Box, Space
from gymnasium.vector import AutoresetMode, VectorEnv
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import InteractionType, TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded, Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase
from torchrl.modules import ProbabilisticActor

from diffusion_gym.models.base import DiffusionModel
from diffusion_gym.transitions import GaussianTransition, Reduction

from ..critic import ValueNetwork
from ..experience.environment import torch_env
from ..policies import BetaDistribution, DenoisingPolicy, Distribution, Policy, TimePredictor

VALUE_KEY = "state_value"


class DiffusionTorchRLEnv(EnvBase):
    """A torch vector environment as TorchRL's: tensors on its device, a batch of num_envs, lanes that TorchRL resets.

    `("next", …)` of an episode's last step is its own last observation, and `done` lanes are reset one by one, as
    TorchRL prefers. Rewards and flags are [num_envs, 1].

    Args:
        env: What `gym.make_vec` returns, with autoreset_mode "DISABLED", in float32.

    Attributes:
        env: The environment.

    Raises:
        TypeError: `env` is no torch vector environment.
        ValueError: its lanes reset themselves, or its latents are not float32.
    """

    def __init__(self, env: VectorEnv) -> None:
        base = torch_env(env)
        if base.autoreset_mode is not AutoresetMode.DISABLED:
            raise ValueError(
                'TorchRL resets lanes itself: make the environment with autoreset_mode="DISABLED", got '
                f"{base.autoreset_mode.name}"
            )
        if base.dtype != torch.float32:
            raise ValueError(
                f"latents in {base.dtype} would be rounded after they were scored: make the environment in float32, "
                'and for speed the policy with precision="bf16"'
            )
        super().__init__(device=base.device, batch_size=torch.Size([env.num_envs]))
        self.env, self._base = env, base
        self._next_seed: int | None = None
        observation = {key: self._spec(space) for key, space in base.single_observation_space.spaces.items()}
        self.observation_spec = Composite(observation, shape=self.batch_size, device=self.device)
        self.action_spec = self._spec(base.single_action_space)
        self.reward_spec = Unbounded(shape=(*self.batch_size, 1), device=self.device)
        flags = {
            key: Categorical(2, shape=(*self.batch_size, 1), dtype=torch.bool, device=self.device)
            for key in ("done", "terminated", "truncated")
        }
        self.done_spec = Composite(flags, shape=self.batch_size, device=self.device)

    @property
    def model(self) -> DiffusionModel:
        """The environment's diffusion model."""
        return self._base.model

    def _spec(self, space: Space) -> TensorSpec:
        assert isinstance(space, Box)
        shape, dtype = (*self.batch_size, *space.shape), torch.from_numpy(space.low).dtype
        if not space.is_bounded():
            return Unbounded(shape=shape, dtype=dtype, device=self.device)
        low, high = (torch.from_numpy(bound).expand(shape) for bound in (space.low, space.high))
        return Bounded(low, high, shape=shape, dtype=dtype, device=self.device)

    def _set_seed(self, seed: int | None) -> None:
        self._next_seed = seed

    def _reset(self, tensordict: TensorDictBase | None = None, **reset_options: Any) -> TensorDictBase:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        partial = {} if mask is None else {"reset_mask": mask.reshape(self.batch_size)}
        observation, info = self.env.reset(seed=self._next_seed, options={**reset_options, **partial})
        self._next_seed = None
        ended = torch.from_numpy(info["ended"]).to(self.device)[:, None]
        return self._batch({**observation, **self._flags(ended)})

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        observation, reward, terminated, _, _ = self.env.step(tensordict["action"])
        return self._batch({**observation, "reward": reward[:, None], **self._flags(terminated[:, None])})

    def _flags(self, terminated: Tensor) -> dict[str, Tensor]:
        return {"done": terminated, "terminated": terminated.clone(), "truncated": torch.zeros_like(terminated)}

    def _batch(self, values: Mapping[str, Tensor]) -> TensorDict:
        return TensorDict(dict(values), batch_size=self.batch_size, device=self.device)


class _ActionDistribution(torch.distributions.Distribution):
    """One of our distributions as torch's, with any leading dimensions; log-probs are reduced as is said."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, ours: Distribution, leading: torch.Size, reduction: Reduction) -> None:
        self.ours, self._reduction = ours, reduction
        super().__init__(leading, ours.mode.shape[1:], validate_args=False)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return a draw from torch's generator, [..., *action]."""
        if len(sample_shape):
            raise ValueError(f"one draw at a time: sample_shape must be (), got {tuple(sample_shape)}")
        return self._unfolded(self.ours.sample().detach())

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probs of actions, [...]."""
        folded = value.reshape(-1, *self.event_shape)
        return self._unfolded(self.ours.log_prob(folded, self._reduction))

    def entropy(self) -> Tensor:
        """Return the entropies, [...], reduced likewise."""
        entropy = self._unfolded(self.ours.entropy())
        return entropy / self.event_shape.numel() if self._reduction == "mean" else entropy

    @property
    def mode(self) -> Tensor:
        """The most probable actions."""
        return self._unfolded(self.ours.mode)

    @property
    def deterministic_sample(self) -> Tensor:
        """The same, by TorchRL's name."""
        return self.mode

    def _unfolded(self, values: Tensor) -> Tensor:
        return values.reshape(*self.batch_shape, *values.shape[1:])


@final
class TransitionDistribution(_ActionDistribution):
    """The step of a sampler, `GaussianTransition`, as torch's distribution.

    Args:
        mean: [..., C, H, W].
        std: [...].
        reduction: Of log-probs over the latents' dimensions.
    """

    def __init__(self, mean: Tensor, std: Tensor, reduction: Reduction = "mean") -> None:
        folded = GaussianTransition(mean.reshape(-1, *mean.shape[std.ndim :]), std.reshape(-1))
        super().__init__(folded, std.shape, reduction)


@final
class RatioDistribution(_ActionDistribution):
    """The ratio of noise ratios, `BetaDistribution`, as torch's distribution.

    Args:
        alpha: [...].
        beta: [...].
    """

    def __init__(self, alpha: Tensor, beta: Tensor) -> None:
        super().__init__(BetaDistribution(alpha.reshape(-1), beta.reshape(-1)), alpha.shape, "sum")


class _Parameters(nn.Module):
    """The parameters of a policy's distributions, for the values of an observation's keys."""

    def __init__(self, policy: Policy, env: DiffusionTorchRLEnv, names: tuple[str, ...]) -> None:
        super().__init__()
        policy.check_fit(env._base.single_observation_space, env._base.single_action_space)
        self.policy = policy
        self.keys = sorted(env._base.single_observation_space.spaces)
        self._names = names

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        observation = dict(zip(self.keys, values, strict=True))
        leading = observation["timestep"].shape[:-1]
        folded = {key: value.flatten(0, len(leading) - 1) for key, value in observation.items()}
        distribution = self.policy.distribution(folded)
        parameters = [getattr(distribution, name) for name in self._names]
        return tuple(parameter.reshape(*leading, *parameter.shape[1:]) for parameter in parameters)


class _Values(nn.Module):
    """The values [..., 1] of states, for the values of an observation's keys."""

    def __init__(self, network: ValueNetwork, env: DiffusionTorchRLEnv) -> None:
        super().__init__()
        self.network = network
        self.keys = sorted(env._base.single_observation_space.spaces)

    def forward(self, *values: Tensor) -> Tensor:
        return self.network(dict(zip(self.keys, values, strict=True)))[..., None]


def denoising_actor(
    policy: DenoisingPolicy, env: DiffusionTorchRLEnv, *, log_prob_reduction: Reduction = "mean"
) -> ProbabilisticActor:
    """Return the denoiser as TorchRL's actor, with the sampler's standard deviation.

    Args:
        policy: The policy.
        env: An environment of DenoisingMDP-v0.
        log_prob_reduction: "mean" over the latents' dimensions, with a clip of about 1e-4; "sum", the density's own,
            diverges at once unless latents are few.

    Raises:
        ValueError: the policy does not fit the environment, or its sampler is deterministic.
    """
    if policy.sampler.scales(policy.model.schedule, *torch.zeros(2, 0)).deterministic:
        raise ValueError(f"{policy.sampler} is deterministic and has no density: take DDIM(eta) with eta > 0")
    parameters = _Parameters(policy, env, ("mean", "std"))
    module = TensorDictModule(parameters, in_keys=parameters.keys, out_keys=["mean", "std"])
    return _actor(module, env, TransitionDistribution, {"reduction": log_prob_reduction})


def time_prediction_actor(policy: TimePredictor, env: DiffusionTorchRLEnv) -> ProbabilisticActor:
    """Return the time predictor as TorchRL's actor.

    Args:
        policy: The policy.
        env: An environment of TimePredictionMDP-v0.

    Raises:
        ValueError: the policy does not fit the environment.
    """
    parameters = _Parameters(policy, env, ("alpha", "beta"))
    module = TensorDictModule(parameters, in_keys=parameters.keys, out_keys=["alpha", "beta"])
    return _actor(module, env, RatioDistribution, {})


def critic_of(network: ValueNetwork, env: DiffusionTorchRLEnv) -> TensorDictModule:
    """Return a value network as TorchRL's critic, which writes "state_value"."""
    values = _Values(network, env)
    return TensorDictModule(values, in_keys=values.keys, out_keys=[VALUE_KEY])


def _actor(
    module: TensorDictModule,
    env: DiffusionTorchRLEnv,
    distribution: type[_ActionDistribution],
    settings: Mapping[str, Any],
) -> ProbabilisticActor:
    return ProbabilisticActor(
        module,
        in_keys=list(module.out_keys),
        spec=env.action_spec,
        distribution_class=distribution,
        distribution_kwargs=dict(settings),
        return_log_prob=True,
        default_interaction_type=InteractionType.RANDOM,  # TorchRL's own is the mode
    )
