"""Stable-Baselines3's VecVideoRecorder films how the embedded model denoises.

    make plug-in-sb3_video

10 seconds. The film, `runs/sb3_video/`, ends with the images: a step that ends an episode shows these, and not the next
episode's noise.
"""

import gymnasium as gym
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecVideoRecorder

import diffusion_gym  # noqa: F401
from agents.adapters.sb3 import DenoisingActorCriticPolicy, DiffusionVecEnv

NUM_STEPS = 20


def main() -> None:
    env = DiffusionVecEnv(gym.make_vec("DenoisingMDP-v0", num_envs=4, num_steps=NUM_STEPS, render_mode="rgb_array"))
    learner = PPO(DenoisingActorCriticPolicy, env, policy_kwargs={"model": env.model}, device="cpu", seed=0)
    recorder = VecVideoRecorder(env, "runs/sb3_video", lambda step: step == 0, video_length=NUM_STEPS)
    observation = recorder.reset()
    for _ in range(NUM_STEPS):
        observation, *_ = recorder.step(learner.predict(observation)[0])
    recorder.close()


if __name__ == "__main__":
    main()
