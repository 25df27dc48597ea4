"""A random policy in the single environment: what a step takes and returns.

    python examples/random_policy.py

10 seconds. Noise is hard to compress: about 3.7 kB, where the model's own images have 2.3 kB.
"""

import gymnasium as gym

import diffusion_gym  # noqa: F401


def main() -> None:
    env = gym.make("DenoisingMDP-v0", reward="incompressibility")
    observation, info = env.reset(seed=0)
    env.action_space.seed(0)
    prompt = env.unwrapped.prompts[info["prompt_id"]]
    print(f"prompt {prompt!r}; observation:", {key: value.shape for key, value in observation.items()})
    terminated, total = False, 0.0
    while not terminated:
        observation, reward, terminated, _, info = env.step(env.action_space.sample())
        total += reward
    print(f"{info['nfe']} steps, return {total:.3f} {env.unwrapped.lane.reward.unit}")
    env.close()


if __name__ == "__main__":
    main()
