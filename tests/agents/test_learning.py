"""The algorithms learn, on the embedded model."""

import gymnasium as gym
import pytest

from agents import DDPOIS, DenoisingPolicy, evaluate


@pytest.mark.slow
def test_brightness_rises_on_held_out_seeds(emoji):
    env = gym.make_vec("diffusion_gym:DenoisingMDP-v0", num_envs=32, num_steps=5, model=emoji, reward="brightness")
    policy = DenoisingPolicy(emoji, mixed_precision="bf16", seed=0)
    learner = DDPOIS(
        policy,
        env,
        learning_rate=1e-4,
        samples_per_epoch=32,
        batch_size=32,
        per_prompt_buffer_size=None,
        seed=0,
    )
    seeds = list(range(64))
    prompts = [env.unwrapped.prompts[seed % 45] for seed in seeds]
    before = evaluate(env, policy, seeds=seeds, prompts=prompts)
    learner.learn(16 * 32 * 5, log_interval=0)
    gain, error = evaluate(env, policy, seeds=seeds, prompts=prompts).gain_over(before)
    assert gain > 5 * error
    assert gain > 0.03
