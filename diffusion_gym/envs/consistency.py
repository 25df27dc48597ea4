"""RLCM's MDP: the denoising MDP of a consistency model, in a few steps of which the last is clean."""

from typing import ClassVar

from typing_extensions import Unpack

from ..models.base import DiffusionModel
from ..samplers import Consistency
from .denoising import DenoisingEnv, DenoisingVectorEnv
from .options import EnvOptions, ModelSource, VectorEnvOptions

_MODEL = "emoji_consistency"


def _check_consistency(model: DiffusionModel) -> None:
    """Raise ValueError if the model's prediction of x_0 is no consistency function."""
    if model.default_sampler != Consistency():
        raise ValueError(
            f"ConsistencyMDP-v0 needs a consistency model, such as {_MODEL!r}; {model.source!r} is sampled by "
            f"{model.default_sampler}, and its prediction of x_0 is a mean of images: take DenoisingMDP-v0, and "
            "DenoisingPolicy(model, sampler=Consistency()) if all noise is to be drawn anew in every step"
        )


class ConsistencyVectorEnv(DenoisingVectorEnv):
    """`gym.make_vec("ConsistencyMDP-v0", num_envs=…)`: many lanes of `ConsistencyEnv` as torch tensors on one device.

    All else is as in `DenoisingVectorEnv`.
    """

    _default_num_steps: ClassVar[int] = 4

    def __init__(  # type: ignore[misc]  # its own default for one of the options
        self, num_envs: int = 1, *, model: ModelSource = _MODEL, **options: Unpack[VectorEnvOptions]
    ) -> None:
        super().__init__(num_envs, model=model, **options)
        _check_consistency(self.model)


class ConsistencyEnv(DenoisingEnv, lane_of=ConsistencyVectorEnv):
    """`gym.make("ConsistencyMDP-v0")`: the multistep sampling of one image by a consistency model as an episode.

    ## Description
    The denoising MDP of a model whose prediction of x_0 is the consistency function f, the end of x_t's own trajectory.
    This is the MDP of RLCM: few steps are enough, and in each of them all noise is drawn anew,

        s = (c, τ, x_τ)    a = x_s    π(a|s) = N(α_s·f_θ(x_τ, τ, c), σ_s²·I)    R = r(x_0, c) at the end

    which is what `DenoisingPolicy(env.unwrapped.model)` draws from. The last step is to the clean end: its action is
    f_θ itself, which has no density, so nobody scores it. An episode of H steps has H − 1 actions to learn from, and
    one of a single step none.

    Source: Oertell et al., 2024, "RL for Consistency Models", https://arxiv.org/abs/2404.03673.

    Note:
        The published code draws and scores noise after the last step too, which no image ever sees.

    ## Action Space
    As `DenoisingEnv`'s.

    ## Observation Space
    As `DenoisingEnv`'s; there is no negative prompt where guidance is embedded.

    ## Rewards
    As `DenoisingEnv`'s.

    ## Starting State
    As `DenoisingEnv`'s.

    ## Episode End
    `terminated` after `num_steps` actions.

    ## Arguments
    Those of `DenoisingEnv`, of which two have other defaults, and the first must be a consistency model:

    | Argument | Default | Meaning |
    |---|---|---|
    | `model` | `"emoji_consistency"` | a name, a diffusers folder, a Hub id, or a loaded `DiffusionModel` |
    | `num_steps` | `4` | actions per episode, at times of the grid that the model was distilled on |
    | `times` | that grid | the times at which actions are taken, such as `(801, 401)`, in place of `num_steps` |

    ## Version History
    - v0: initial version.
    """

    _lane_of: ClassVar[type[DenoisingVectorEnv]] = ConsistencyVectorEnv

    def __init__(  # type: ignore[misc]  # its own default for one of the options
        self, *, model: ModelSource = _MODEL, **options: Unpack[EnvOptions]
    ) -> None:
        super().__init__(model=model, **options)
