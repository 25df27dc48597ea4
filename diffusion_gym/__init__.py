"""The denoising of a diffusion model as a Gymnasium environment.

Importing this package registers its environments; neither diffusers nor transformers is imported before an
environment is made.
"""

from gymnasium.envs.registration import register

__version__ = "0.1.0"

register(
    id="DenoisingMDP-v0",
    entry_point="diffusion_gym.envs.denoising:DenoisingEnv",
    vector_entry_point="diffusion_gym.envs.denoising:DenoisingVectorEnv",
)
register(
    id="ConsistencyMDP-v0",
    entry_point="diffusion_gym.envs.consistency:ConsistencyEnv",
    vector_entry_point="diffusion_gym.envs.consistency:ConsistencyVectorEnv",
)
register(
    id="TimePredictionMDP-v0",
    entry_point="diffusion_gym.envs.time_prediction:TimePredictionEnv",
    vector_entry_point="diffusion_gym.envs.time_prediction:TimePredictionVectorEnv",
)
