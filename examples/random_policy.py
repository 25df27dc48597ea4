"""A random policy in the single environment: what a step takes and returns.

    python examples/random_policy.py

10 seconds. Noise is hard to compress: about 3.7 kB, where the model's own images have 2.3 kB.
"""

import gymnasium as gym
import tyro

import diffusion_gym  # noqa: F401


def main(reward: str = "incompressibility", num_steps: int = 20, seed: int = 0) -> None:
    """Play one episode.

    Args:
        reward: A reward's name.
        num_steps: Denoising steps.
        seed: Of the prompt, the noise and the actions.
    """
    env = gym.make("DenoisingMDP-v0", reward=reward, num_steps=num_steps)
    observation, info = env.reset(seed=seed)
    env.action_space.seed(seed)
    prompt = env.unwrapped.prompts[info["prompt_id"]]
    print(f"prompt {prompt!r}; observation:", {key: value.shape for key, value in observation.items()})
    terminated, total = False, 0.0
    while not terminated:
        observation, step_reward, terminated, _, info = env.step(env.action_space.sample())
        total += step_reward
    print(f"{info['nfe']} steps, return {total:.3f} {env.unwrapped.lane.reward.unit}")
    env.close()


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
