"""Stable-Baselines3: its stock PPO and A2C train a denoiser or a time predictor as the actor.

    env = VecMonitor(DiffusionVecEnv(gym.make_vec("DenoisingMDP-v0", num_envs=32, num_steps=5)))
    PPO(DenoisingActorCriticPolicy, env, n_steps=5, n_epochs=1, gamma=1.0, gae_lambda=1.0, clip_range=1e-4,
        learning_rate=1e-4, policy_kwargs={"model": "emoji"}).learn(4_800)

SB3's defaults fit games: γ = 0.99 would discount the only reward, that of the last step, and a clip of 0.2 never clips
the ratio of *mean* log-probs. `n_steps` is best a multiple of the episodes' steps: then rollouts are whole episodes.
"""

from .policies import ActorDistribution, DenoisingActorCriticPolicy, TimePredictionActorCriticPolicy
from .vec_env import DiffusionVecEnv
from .zoo import BatchedLanes

__all__ = [
    "ActorDistribution",
    "BatchedLanes",
    "DenoisingActorCriticPolicy",
    "DiffusionVecEnv",
    "TimePredictionActorCriticPolicy",
]
