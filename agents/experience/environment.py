"""The one place where `agents` takes an environment as a torch vector environment."""

from gymnasium.vector import VectorEnv

from diffusion_gym import transfer
from diffusion_gym.envs.contract import TorchVectorEnv

from ..policies.base import Policy


def torch_env(env: object) -> TorchVectorEnv:
    """Return the torch vector environment under its wrappers: what policies and algorithms may ask is there.

    Raises:
        TypeError: it is none.
    """
    unwrapped = env.unwrapped if isinstance(env, VectorEnv) else env
    if not isinstance(unwrapped, VectorEnv) or not isinstance(unwrapped, TorchVectorEnv):
        raise TypeError(f"env must be a torch vector environment: gym.make_vec(id, num_envs=…); got {env}")
    return unwrapped


def check_fit(env: VectorEnv, policy: Policy) -> None:
    """Check that a policy can act in an environment.

    Raises:
        TypeError: the environment is no torch vector environment.
        ValueError: the policy is made for episodes, spaces, prompts or a device other than the environment's.
    """
    below = torch_env(env)
    if None not in (policy.max_steps, below.max_steps) and policy.max_steps != below.max_steps:
        raise ValueError(
            f"the policy's steps are those of episodes of at most {policy.max_steps} steps, "
            f"the env's have {below.max_steps}"
        )
    policy.check_fit(env.single_observation_space, env.single_action_space)
    policy.check_prompts(env.single_observation_space, below.prompts.texts, below.negative_prompt)
    if not transfer.is_same_device(policy.device, below.device):
        raise ValueError(
            f"the policy is on {policy.device}, the environment on {below.device}: make both with the same device"
        )
