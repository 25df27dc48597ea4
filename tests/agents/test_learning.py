"""The algorithms learn, on the embedded model."""

import gymnasium as gym
import pytest

from agents import DDPOIS, DDPOSF, DenoisingPolicy, evaluate


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "use_lora"), [(DDPOSF, False), (DDPOIS, True)], ids=["sf-full", "is-lora"])
def test_brightness_rises_on_held_out_seeds(emoji, algorithm, use_lora):
    env = gym.make_vec("diffusion_gym:DenoisingMDP-v0", num_envs=16, num_steps=3, model=emoji, reward="brightness")
    policy = DenoisingPolicy(emoji, use_lora=use_lora, mixed_precision="bf16", seed=0)
    learner = algorithm(
        policy,
        env,
        learning_rate=1e-2 if use_lora else 2e-4,
        samples_per_epoch=16,
        batch_size=16,
        per_prompt_buffer_size=None,
        seed=0,
    )
    seeds = list(range(48))
    prompts = [env.unwrapped.prompts[seed % 45] for seed in seeds]
    before = evaluate(env, policy, seeds=seeds, prompts=prompts)
    learner.learn(14 * 16 * 3, log_interval=0)
    gain, error = evaluate(env, policy, seeds=seeds, prompts=prompts).gain_over(before)
    assert gain > 5 * error
    assert gain > 0.03
