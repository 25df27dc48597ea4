"""Conformance checks that anyone can run on an environment of their own.

Gymnasium checks single environments (`gymnasium.utils.env_checker.check_env`) but has no check for vector ones.
"""

from collections.abc import Mapping

import numpy as np
import torch
from gymnasium.spaces import Dict
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

_DTYPE_KINDS = {
    "f": torch.Tensor.is_floating_point,
    "i": lambda t: not t.is_floating_point() and t.dtype != torch.bool,
    "u": lambda t: t.dtype == torch.uint8,
    "b": lambda t: t.dtype == torch.bool,
}


def check_vector_env(env: VectorEnv, *, max_steps: int = 1000) -> None:
    """Check that a torch vector environment keeps Gymnasium's contract in its own autoreset mode.

    Spaces against shapes, dtypes and devices; seeds; that a step changes neither what was returned before nor the
    action, and returns no memory of the action's; the autoreset mode's promises through the end of an episode and
    beyond; partial reset; info masks; closing twice. The environment is closed in the end.

    Args:
        env: A vector environment with `Dict` observations of torch tensors and `Box` actions.
        max_steps: Actions within which an episode must end under random play.

    Raises:
        AssertionError: the contract is broken; the message says where.
    """
    assert "autoreset_mode" in env.metadata, 'metadata["autoreset_mode"] is missing'
    mode: AutoresetMode = env.metadata["autoreset_mode"]
    assert isinstance(mode, AutoresetMode), f'metadata["autoreset_mode"] must be an AutoresetMode, got {mode!r}'
    assert mode is getattr(env.unwrapped, "autoreset_mode", None), "env.autoreset_mode must be the metadata's"
    first = _check_seeding(env)
    observation = first
    for _ in range(max_steps):
        action = _random_action(env, observation)
        kept = {key: value.clone() for key, value in {**observation, "action": action}.items()}
        following, reward, terminated, truncated, info = env.step(action)
        _check_observation(env, following)
        _check_step(env, reward, terminated, truncated, info)
        _check_memory(kept, observation, following, action)
        if info["ended"].any():
            break
        observation = following
    else:
        raise AssertionError(f"no episode ended within {max_steps} steps")
    _check_autoreset(env, mode, following, terminated, info, first)
    _check_partial_reset(env)
    env.close()
    env.close()


def _random_action(env: VectorEnv, observation: Mapping[str, Tensor]) -> Tensor:
    device = next(iter(observation.values())).device
    dtype = next((v.dtype for v in observation.values() if v.is_floating_point()), torch.float32)
    return torch.from_numpy(np.asarray(env.action_space.sample())).to(device, dtype)


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def _check_seeding(env: VectorEnv) -> Mapping[str, Tensor]:
    """Check that the seed decides the first observation, lane by lane; return one."""
    observation, info = env.reset(seed=7)
    _check_observation(env, observation)
    assert isinstance(info, dict), f"reset must return an info dict, got {type(info).__name__}"
    again, _ = env.reset(seed=7)
    assert _equal(observation, again), "two resets with one seed must give equal observations"
    lanes, _ = env.reset(seed=[7 + lane for lane in range(env.num_envs)])  # type: ignore[arg-type]
    assert _equal(observation, lanes), "seed=s must seed lane i with s + i"
    other, _ = env.reset(seed=1234567)
    assert not _equal(observation, other), "another seed must give another observation"
    env.reset(seed=7)
    return observation


def _check_observation(env: VectorEnv, observation: Mapping[str, Tensor]) -> None:
    space = env.single_observation_space
    assert isinstance(space, Dict), f"the observation space must be a Dict, got {space}"
    assert set(observation) == set(space), f"observation keys {set(observation)} differ from the space's {set(space)}"
    devices = {value.device for value in observation.values()}
    assert len(devices) == 1, f"all observations must be on one device, got {devices}"
    for key, value in observation.items():
        expected = (env.num_envs, *(space[key].shape or ()))
        assert value.shape == expected, f"observation {key!r} must have shape {expected}, got {tuple(value.shape)}"
        kind = np.dtype(space[key].dtype).kind
        assert _DTYPE_KINDS[kind](value), f"observation {key!r} must be of kind {kind!r}, got {value.dtype}"
        assert not value.requires_grad, f"observation {key!r} must not carry a gradient"
        for lane in value.float().cpu().numpy().astype(space[key].dtype):
            assert space[key].contains(lane), f"observation {key!r} is outside its space {space[key]}"


def _check_step(
    env: VectorEnv, reward: Tensor, terminated: Tensor, truncated: Tensor, info: Mapping[str, object]
) -> None:
    shape = (env.num_envs,)
    assert reward.shape == shape, f"the reward must have shape {shape}, got {tuple(reward.shape)}"
    assert reward.dtype == torch.float32, f"the reward must be float32, got {reward.dtype}"
    for name, flag in (("terminated", terminated), ("truncated", truncated)):
        assert flag.shape == shape, f"{name} must have shape {shape}, got {tuple(flag.shape)}"
        assert flag.dtype == torch.bool, f"{name} must be bool, got {flag.dtype}"
    for key, mask in info.items():
        if key.startswith("_"):
            assert isinstance(mask, np.ndarray), f"info mask {key!r} must be a numpy array, got {type(mask).__name__}"
            assert mask.shape == shape, f"info mask {key!r} must have shape {shape}, got {mask.shape}"
            assert mask.dtype == np.bool_, f"info mask {key!r} must be bool, got {mask.dtype}"
            assert key[1:] in info, f"info mask {key!r} has no entry {key[1:]!r}"
    ended = info.get("ended")
    assert isinstance(ended, np.ndarray), 'info["ended"] must be a numpy array'
    assert ended.tolist() == (terminated | truncated).tolist(), 'info["ended"] must say which lanes ended'


def _check_memory(
    kept: Mapping[str, Tensor], before: Mapping[str, Tensor], after: Mapping[str, Tensor], action: Tensor
) -> None:
    """Check that a step changed nothing of what was there before it, and that what moves is never the same memory."""
    assert torch.equal(action, kept["action"]), "step must not change the caller's action"
    for key, value in after.items():
        assert value.data_ptr() != action.data_ptr(), f"observation {key!r} shares memory with the action"
        assert torch.equal(before[key], kept[key]), f"observation {key!r} was changed after it was returned"
    for key in after.keys() & {"latents", "timestep", "next_timestep"}:
        assert after[key].data_ptr() != before[key].data_ptr(), f"observation {key!r} shares memory with the last one"


def _check_autoreset(
    env: VectorEnv,
    mode: AutoresetMode,
    last: Mapping[str, Tensor],
    terminated: Tensor,
    info: Mapping[str, object],
    first: Mapping[str, Tensor],
) -> None:
    """Check what the mode promises on the step that ended an episode and on the one after it."""
    ended = info["ended"]
    assert isinstance(ended, np.ndarray)
    if mode is AutoresetMode.SAME_STEP:
        for key in ("final_obs", "final_info"):
            assert key in info, f"SAME_STEP must give info[{key!r}] on a step that ends an episode"
            assert np.array_equal(info[f"_{key}"], ended), f'info["_{key}"] must say which lanes ended'  # type: ignore[arg-type]
        final = info["final_obs"]
        assert isinstance(final, Mapping)
        _check_observation(env, final)
        assert not _equal(final, last), "SAME_STEP must return the next episode's observation"
        return
    assert "final_obs" not in info, f"{mode.name} must not give final_obs"
    if mode is AutoresetMode.DISABLED:
        if not ended.all():
            rested, reward, still, _, _ = env.step(_random_action(env, last))
            for lane in np.flatnonzero(ended):
                assert still[lane], "a lane that ended must stay ended until it is reset"
                assert reward[lane] == 0, "a lane that ended must earn nothing"
                assert all(torch.equal(rested[k][lane], last[k][lane]) for k in last), "a lane that ended must rest"
        return
    fresh, reward, terminated, _, after = env.step(_random_action(env, last))
    for lane in np.flatnonzero(ended):
        assert reward[lane] == 0, "NEXT_STEP must give reward 0 on the step that resets"
        assert not terminated[lane], "NEXT_STEP must not terminate on the step that resets"
        assert not after["ended"][lane], 'NEXT_STEP must not say "ended" on the step that resets'
        changed = any(not torch.equal(fresh[key][lane], last[key][lane]) for key in first)
        assert changed, "NEXT_STEP must return a new episode's observation"


def _check_partial_reset(env: VectorEnv) -> None:
    """Check that a masked reset touches the lanes of the mask and no other."""
    before, _ = env.reset(seed=3)
    if env.num_envs < 2:
        return
    mask = np.zeros(env.num_envs, dtype=bool)
    mask[0] = True
    options = {"reset_mask": mask}
    after, _ = env.reset(seed=99, options=options)
    assert "reset_mask" in options, "reset must not change the caller's options"
    assert any(not torch.equal(after[key][0], before[key][0]) for key in before), "the masked lane must be reset"
    for key in before:
        assert torch.equal(after[key][1:], before[key][1:]), f"{key!r} of a lane outside the mask was changed"
    again, _ = env.reset(seed=99, options={"reset_mask": torch.from_numpy(mask)})
    assert all(torch.equal(again[key][0], after[key][0]) for key in after), "torch and numpy masks must do the same"
