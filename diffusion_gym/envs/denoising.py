"""DDPO's MDP: the action is the next latents."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from gymnasium.spaces import Box, Space
from gymnasium.utils import EzPickle
from gymnasium.vector import AutoresetMode
from torch import Tensor
from typing_extensions import Unpack

from ..grids import chosen_grid
from .core import DiffusionVectorEnv
from .options import EnvOptions, VectorEnvOptions, refuse_vector_options
from .single import DiffusionEnv


class DenoisingVectorEnv(DiffusionVectorEnv, EzPickle):
    """`gym.make_vec("DenoisingMDP-v0", num_envs=…)`: many lanes of `DenoisingEnv` as torch tensors on one device.

    Observations, actions, rewards and flags are those of `DenoisingEnv` with a leading dimension `num_envs`, as
    tensors on `device` (latents and actions in `dtype`). All three of Gymnasium's autoreset modes are there, in
    `metadata["autoreset_mode"]` and as the attribute `autoreset_mode`:

    - SAME_STEP (default): a step that ends an episode returns the next one's first observation; the last one is in
      `info["final_obs"]`, its info in `info["final_info"]`. Both are dicts of batches, `final_obs["latents"][lane]`,
      of which the lanes of `info["_final_obs"]` mean something (Gymnasium's `SyncVectorEnv` has an array of dicts).
    - NEXT_STEP: it returns the last observation; the lane's next step ignores its action and resets it.
    - DISABLED: it returns the last observation and the lane rests (reward 0, `terminated` stays True) until
      `reset(options={"reset_mask": …})`.

    `info["ended"]`, a numpy array, says on the host which lanes ended. No step waits for the device but the last one
    of an episode, where the reward is computed.

    Gymnasium's vector wrappers that compute with NumPy (`RecordEpisodeStatistics`) work behind
    `diffusion_gym.wrappers.TorchToNumpy(env)`. Stable-Baselines3 and TorchRL take it through `agents.adapters`.

    Args are those of `DenoisingEnv`, and:
        num_envs: The number of lanes.
        autoreset_mode: An `AutoresetMode`, its name or its value.
    """

    action_is_next_latents = True
    _default_num_steps: ClassVar[int] = 20

    def __init__(
        self,
        num_envs: int = 1,
        *,
        num_steps: int | None = None,
        times: Sequence[float] | None = None,
        **options: Unpack[VectorEnvOptions],
    ) -> None:
        EzPickle.__init__(self, num_envs, num_steps=num_steps, times=times, **options)
        super().__init__(num_envs, **options)
        self.single_action_space = Box(-np.inf, np.inf, self.model.latent_shape, np.float32)
        grid = chosen_grid(self.model.schedule, num_steps=num_steps, times=times, default_steps=self._default_num_steps)
        self._grid = grid.float().numpy()
        self.times = tuple(self._grid.tolist())
        self.num_steps = self._length = len(grid) - 1

    def _time_spaces(self) -> dict[str, Space]:
        schedule = self.model.schedule
        low, high = min(schedule.clean, 0.0), schedule.max_time
        return {key: Box(low, high, (1,), np.float32) for key in ("timestep", "next_timestep")}

    def _observe_time(self) -> dict[str, np.ndarray]:
        step = self._lanes.step
        following = np.minimum(step + 1, self._length)
        return {"timestep": self._grid[step, None], "next_timestep": self._grid[following, None]}

    def _advance(self, actions: Tensor, active: np.ndarray) -> None:
        moved = self._to_device(active).reshape(-1, *[1] * (actions.ndim - 1))
        self._lanes.latents = actions.clone() if active.all() else torch.where(moved, actions, self._lanes.latents)
        self._lanes.step[active] += 1

    def _finished(self) -> np.ndarray:
        return self._lanes.step == self._length


class DenoisingEnv(DiffusionEnv, EzPickle, lane_of=DenoisingVectorEnv):
    """`gym.make("DenoisingMDP-v0")`: the denoising of one image as an episode.

    ## Description
    The agent denoises an image step by step: it sees the prompt, the time t and the noisy latents x_t, and its action
    *is* the next latents x_s. The environment stores them, and when the last time is reached decodes them to an image
    and rewards it. It never calls the denoising network: the network is the policy. This is the MDP of DDPO:

        s = (c, t, x_t)    a = x_s    π(a|s) = p_θ(x_s | x_t, c)    ρ_0 = p(c)·N(0, I)    R = r(x_0, c) at the end

    Source: Black et al., 2023, section 4.3, https://arxiv.org/abs/2305.13301.

    ## Action Space
    `Box(-inf, inf, (C, H, W), float32)`: x_s.

    ## Observation Space
    A `Dict`; C, H, W are the latents' (4, 16, 16 with the emoji model), P is the number of prompts.

    | Key | Shape | Dtype | Min | Max | Meaning |
    |---|---|---|---|---|---|
    | `latents` | (C, H, W) | float32 | −∞ | ∞ | x_t |
    | `timestep` | (1,) | float32 | −1 or 0 | 999 or 1 | t: an index for discrete models, σ for flow models |
    | `next_timestep` | (1,) | float32 | −1 or 0 | 999 or 1 | s < t; equal to t at the end |
    | `prompt_id` | (1,) | int64 | −1 | P − 1 | index in `env.unwrapped.prompts`; −1, none: a text given to `reset` |
    | `prompt_embeds` | (L, D) | float32 | −∞ | ∞ | the prompt's embedding (with `observe_embeds`) |
    | `negative_prompt_embeds` | (L, D) | float32 | −∞ | ∞ | the negative prompt's (with `observe_embeds`) |

    `info` has `prompt_id`, `nfe` (steps taken), `timestep`, `next_timestep` and `ended`; on the last step also
    `reward/<name>`, `reward_invalid` and `images` [3, H, W] in [0, 1].

    ## Rewards
    0 until the last step, then the reward of the decoded x_0: an episode's return is `reward_fn(x_0)`. Where an action,
    the image or its reward is NaN or infinite, the last step raises; with `on_invalid_reward="nan"` that lane's reward
    is NaN and its `info["reward_invalid"]` True, other lanes keep theirs, and no such image is shown to the reward.

    ## Starting State
    A prompt drawn uniformly (or by the set's weights), and x_T ~ N(0, I) (N(0, σ_max²·I) where variance explodes), both
    from the lane's own generator. `reset(options=…)` fixes them: `prompt` (any text), `prompt_id`, `latents`.

    ## Episode End
    `terminated` after `num_steps` actions. There is no truncation: with `gym.make(…, max_episode_steps=…)` below
    `num_steps`, which is warned about, no episode reaches its reward.

    ## Arguments
    | Argument | Default | Meaning |
    |---|---|---|
    | `model` | `"emoji"` | a name, a diffusers folder, a Hub id, or a loaded `DiffusionModel` |
    | `reward` | `"incompressibility"` | a name, `{name: weight}`, a `Reward`, or `f(images, prompts, metadata)` |
    | `prompts` | the model's (`"simple_animals"`) | a name, a file, a list, or `{prompt: weight}` |
    | `num_steps` | `20` | actions per episode, at the times of the model's own grid of so many |
    | `times` | that grid | the times at which actions are taken, such as `(801, 401)`, in place of `num_steps` |
    | `device` | `"cpu"` | where the model runs |
    | `dtype` | `"float32"` | precision of latents and frozen denoiser |
    | `image_size` | the model's | height and width in pixels, or one number for both |
    | `variant` | none | which of the files of weights to read, such as "fp16" |
    | `without` | none | parts of the folder to leave out, such as ("text_encoder_3",) |
    | `offload` | no | keep text encoders and autoencoder on the CPU between uses |
    | `text_encoder_dtype` | `"float32"` | precision of the text encoders |
    | `negative_prompt` | `""` | what guidance moves away from |
    | `observe_embeds` | below 1 MB a lane | whether embeddings are part of the observation |
    | `render_mode` | `None` | `"rgb_array"`: the decoded x_t; x_0 once the episode has ended |
    | `on_invalid_reward` | `"raise"` | `"nan"`: no error where an action, image or reward is NaN or infinite (below) |

    ## Version History
    - v0: initial version.
    """

    _lane_of: ClassVar[type[DenoisingVectorEnv]] = DenoisingVectorEnv

    def __init__(
        self,
        *,
        num_steps: int | None = None,
        times: Sequence[float] | None = None,
        **options: Unpack[EnvOptions],
    ) -> None:
        EzPickle.__init__(self, num_steps=num_steps, times=times, **options)
        refuse_vector_options(options)
        lane = self._lane_of(1, num_steps=num_steps, times=times, autoreset_mode=AutoresetMode.DISABLED, **options)
        super().__init__(lane, max_steps=lane._length)
