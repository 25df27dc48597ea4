"""Conformance checks that anyone can run on an environment of their own.

Gymnasium checks single environments (`gymnasium.utils.env_checker.check_env`) but has no check for vector ones.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import get_origin, get_type_hints

import numpy as np
import torch
from gymnasium.error import ClosedEnvironmentError
from gymnasium.spaces import Dict
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from . import transfer
from .envs.contract import TorchVectorEnv, missing_members

Row = dict[str, Tensor]
Start = tuple[Mapping[str, Tensor], Mapping[str, object]]

_DTYPE_KINDS = {
    "f": torch.Tensor.is_floating_point,
    "i": lambda t: not t.is_floating_point() and t.dtype != torch.bool,
    "u": lambda t: t.dtype == torch.uint8,
    "b": lambda t: t.dtype == torch.bool,
}
_MOVING = ("latents", "timestep", "next_timestep")


@dataclass(frozen=True)
class _Episode:
    """The observations and rewards of one episode of one lane, from the first observation to the last one."""

    observations: list[Row]
    rewards: list[Tensor]


def check_vector_env(env: VectorEnv, *, max_steps: int = 1000) -> None:
    """Check that a vector environment is a `TorchVectorEnv`, and keeps Gymnasium's contract in its own autoreset mode.

    The checks are these:

    - It has the members of a `TorchVectorEnv`, and they are true: the keys of the observation that are constant within
      an episode, the number of actions of an episode, and whether the action is the next latents.
    - Observations, rewards and flags have the shapes, dtypes and device that the spaces say; so have the info masks.
    - A seed decides the first observation, and a reset without one draws another.
    - A step changes neither its action nor what was returned before, and returns no memory of the action's.
    - Two seeded runs of two episodes are equal to the last bit.
    - The autoreset mode's promises hold at the end of an episode, and the episode that it starts is the one that a
      reset would have started.
    - A partial reset touches no other lane, and a closed environment cannot be used.

    The environment is closed in the end.

    Args:
        env: A vector environment with `Dict` observations of torch tensors and `Box` actions; wrappers around it are
            checked with it. `env.unwrapped` has the members of a `TorchVectorEnv`.
        max_steps: Actions within which an episode must end under random play.

    Raises:
        AssertionError: the contract is broken; the message says where.
    """
    assert "autoreset_mode" in env.metadata, 'metadata["autoreset_mode"] is missing'
    mode: AutoresetMode = env.metadata["autoreset_mode"]
    assert isinstance(mode, AutoresetMode), f'metadata["autoreset_mode"] must be an AutoresetMode, got {mode!r}'
    bare = _checked_members(env)
    assert mode is bare.autoreset_mode, "env.autoreset_mode must be the metadata's"
    _check_seeding(env)
    episodes = _play(env, env.reset(seed=7), max_steps=max_steps)
    _check_twin(episodes, _play(env, env.reset(seed=7), max_steps=max_steps))
    _check_next_episode(env, [lane[1] for lane in episodes], max_steps=max_steps)
    _check_lengths(bare, episodes)
    _check_partial_reset(env)
    if mode is AutoresetMode.DISABLED and env.num_envs > 1:
        _check_rest(env, max_steps=max_steps)
    _check_closing(env)


def _checked_members(env: VectorEnv) -> TorchVectorEnv:
    """Return the environment without its wrappers, after a check that it has the members of a `TorchVectorEnv`."""
    bare = env.unwrapped
    kind = type(bare).__name__
    missing = missing_members(bare)
    assert not missing, (
        f"{kind} lacks {', '.join(missing)}: diffusion_gym.envs.contract.TorchVectorEnv says what they are, and "
        "diffusion_gym.envs.core.DiffusionVectorEnv has them all"
    )
    assert isinstance(bare, TorchVectorEnv)
    for name, member in vars(TorchVectorEnv).items():
        if isinstance(member, property):
            hint = get_type_hints(member.fget)["return"]
            value, origin = getattr(bare, name), get_origin(hint)
            said = getattr(hint, "__name__", str(hint))
            is_of_type = isinstance(value, hint if origin in (None, UnionType) else origin)
            assert is_of_type, f"{kind}.{name} must be of type {said}, got {value!r}"
    for name in ("constant_keys", "large_keys"):
        unknown = getattr(bare, name) - set(bare.single_observation_space)
        assert not unknown, f"{kind}.{name} must be keys of the observation, which has no {sorted(unknown)}"
    times, num_steps = bare.times, bare.num_steps
    assert not times or len(times) - 1 == num_steps, f"{kind} has num_steps={num_steps}, but {len(times)} times"
    return bare


def _play(
    env: VectorEnv, start: Start, *, max_steps: int, first_episode: int = 0, num_episodes: int = 2
) -> list[list[_Episode]]:
    """Return each lane's episodes from `start` on, after a check of every step.

    A lane's action depends on the lane, its episode and its step alone, whatever the other lanes do.
    """
    mode: AutoresetMode = env.metadata["autoreset_mode"]
    before, reset_info = start
    _check_observation(env, before)
    played: list[list[_Episode]] = [[] for _ in range(env.num_envs)]
    running = [_Episode([_row(before, lane)], []) for lane in range(env.num_envs)]
    resetting = np.zeros(env.num_envs, dtype=bool)
    reward: Tensor | None = None
    while not all(len(episodes) >= num_episodes for episodes in played):
        places = [(first_episode + len(played[lane]), len(running[lane].rewards)) for lane in range(env.num_envs)]
        assert max(step for _, step in places) < max_steps, f"no episode ended within {max_steps} steps"
        action = _actions(env, before, places)
        kept = [value.clone() for value in (*before.values(), action)]
        last_reward, kept_reward = reward, None if reward is None else reward.clone()
        after, reward, terminated, truncated, info = env.step(action)
        _check_observation(env, after)
        _check_step(env, reward, terminated, truncated, info)
        _check_memory(before, after, action, kept)
        if last_reward is not None:
            assert torch.equal(last_reward, kept_reward), "the reward was changed after it was returned"  # type: ignore[arg-type]
            assert last_reward.data_ptr() != reward.data_ptr(), "the reward shares memory with the last one"
        ended: np.ndarray = info["ended"]
        final = _final_observation(env, mode, after, info, ended, reset_info)
        for lane in range(env.num_envs):
            if resetting[lane]:
                assert reward[lane] == 0, "NEXT_STEP must give reward 0 on the step that resets"
                assert not ended[lane], "NEXT_STEP must not end an episode on the step that resets"
                running[lane] = _Episode([_row(after, lane)], [])
                continue
            now = _row(final if ended[lane] else after, lane)
            _check_moved(env, running[lane].observations[-1], now, action[lane])
            running[lane].observations.append(now)
            running[lane].rewards.append(reward[lane].clone())
            if ended[lane]:
                played[lane].append(running[lane])
                running[lane] = _Episode([_row(after, lane)], [])
        resetting = ended & (mode is AutoresetMode.NEXT_STEP)
        if mode is AutoresetMode.DISABLED and ended.any():
            after, _ = env.reset(options={"reset_mask": ended})
            for lane in np.flatnonzero(ended).tolist():
                running[lane] = _Episode([_row(after, lane)], [])
        before = after
    return played


def _row(observation: Mapping[str, Tensor], lane: int) -> Row:
    return {key: value[lane].clone() for key, value in observation.items()}


def _actions(env: VectorEnv, observation: Mapping[str, Tensor], places: list[tuple[int, int]]) -> Tensor:
    """Return random actions, for each lane the one of its (episode, step)."""
    rows = []
    for lane, (episode, step) in enumerate(places):
        env.action_space.seed(1009 * episode + step)
        rows.append(np.asarray(env.action_space.sample())[lane])
    device = next(iter(observation.values())).device
    dtype = next((value.dtype for value in observation.values() if value.is_floating_point()), torch.float32)
    return torch.from_numpy(np.stack(rows)).to(device, dtype)


def _equal(row: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return row.keys() == other.keys() and all(torch.equal(row[key], other[key]) for key in row)


def _close(row: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return whether two rows agree but for the last bits, in which networks differ between batches."""
    return row.keys() == other.keys() and all(
        torch.allclose(row[key].float(), other[key].float(), rtol=1e-2, atol=1e-2) for key in row
    )


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
        for lane in transfer.to_host(value.float()).astype(space[key].dtype):
            assert space[key].contains(lane), f"observation {key!r} is outside its space {space[key]}"


def _check_step(
    env: VectorEnv, reward: Tensor, terminated: Tensor, truncated: Tensor, info: Mapping[str, object]
) -> None:
    shape = (env.num_envs,)
    assert reward.shape == shape, f"the reward must have shape {shape}, got {tuple(reward.shape)}"
    assert reward.dtype == torch.float32, f"the reward must be float32, got {reward.dtype}"
    assert not reward.requires_grad, "the reward must not carry a gradient"
    rewards = transfer.to_host(reward)
    assert np.isfinite(rewards).all(), f"the reward must be finite, got {rewards.tolist()}"
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
    over = transfer.to_host(terminated | truncated)
    assert ended.tolist() == over.tolist(), 'info["ended"] must say which lanes ended'


def _check_memory(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], action: Tensor, kept: list[Tensor]
) -> None:
    """Check that a step changed nothing that was there before it, and that moving observations share no memory."""
    assert torch.equal(action, kept[-1]), "step must not change the caller's action"
    for (key, value), copy in zip(before.items(), kept, strict=False):
        assert after[key].data_ptr() != action.data_ptr(), f"observation {key!r} shares memory with the action"
        assert torch.equal(value, copy), f"observation {key!r} was changed after it was returned"
        shared = key in _MOVING and after[key].data_ptr() == value.data_ptr()
        assert not shared, f"observation {key!r} shares memory with the last one"


def _check_moved(env: VectorEnv, before: Row, after: Row, action: Tensor) -> None:
    """Check that a lane's action has been taken, and has changed nothing that is said to be constant."""
    assert not _equal(before, after), "a step must change what a lane observes, and the last one be in final_obs"
    if env.unwrapped.action_is_next_latents:  # type: ignore[attr-defined]
        assert torch.equal(after["latents"], action), "the latents that are observed must be the action"
    for key in env.unwrapped.constant_keys:  # type: ignore[attr-defined]
        same = torch.equal(before[key], after[key])
        assert same, f"observation {key!r} is of constant_keys, but changed within an episode"


def _final_observation(
    env: VectorEnv,
    mode: AutoresetMode,
    after: Mapping[str, Tensor],
    info: Mapping[str, object],
    ended: np.ndarray,
    reset_info: Mapping[str, object],
) -> Mapping[str, Tensor]:
    """Return the observation that holds the last ones of the lanes that ended, after a check of the autoreset mode."""
    if mode is not AutoresetMode.SAME_STEP:
        assert "final_obs" not in info, f"{mode.name} must not give final_obs"
        return after
    if not ended.any():
        return after
    for key in ("final_obs", "final_info"):
        assert key in info, f"SAME_STEP must give info[{key!r}] on a step that ends an episode"
        assert np.array_equal(info[f"_{key}"], ended), f'info["_{key}"] must say which lanes ended'  # type: ignore[arg-type]
    final, final_info = info["final_obs"], info["final_info"]
    assert isinstance(final, Mapping)
    assert isinstance(final_info, Mapping)
    _check_observation(env, final)
    missing = {key for key in reset_info if not key.startswith("_")} - set(final_info)
    assert not missing, f"final_info must have what info has, but {sorted(missing)} are missing"
    for lane in np.flatnonzero(ended).tolist():
        fresh = not _equal(_row(final, lane), _row(after, lane))
        assert fresh, "SAME_STEP must return the next episode's observation"
    return final


def _check_seeding(env: VectorEnv) -> None:
    """Check that the seed decides the first observation, lane by lane, and that a reset without one draws another."""
    observation, info = env.reset(seed=7)
    _check_observation(env, observation)
    assert isinstance(info, dict), f"reset must return an info dict, got {type(info).__name__}"
    unseeded, _ = env.reset()
    again, _ = env.reset(seed=7)
    assert _equal(observation, again), "two resets with one seed must give equal observations"
    repeated, _ = env.reset()
    assert _equal(unseeded, repeated), "a reset without a seed must go on with the seeded streams"
    following, _ = env.reset()
    for one, other in ((observation, unseeded), (unseeded, following)):
        for lane in range(env.num_envs):
            assert not _equal(_row(one, lane), _row(other, lane)), "a reset without a seed must draw another episode"
    lanes, _ = env.reset(seed=[7 + lane for lane in range(env.num_envs)])  # type: ignore[arg-type]
    assert _equal(observation, lanes), "seed=s must seed lane i with s + i"
    other, _ = env.reset(seed=1234567)
    assert not _equal(observation, other), "another seed must give another observation"


def _check_twin(episodes: list[list[_Episode]], twins: list[list[_Episode]]) -> None:
    """Check that two runs with one seed and the same actions are equal to the last bit."""
    for lane, twin_lane in zip(episodes, twins, strict=True):
        for episode, twin in zip(lane, twin_lane, strict=True):
            equal = len(episode.rewards) == len(twin.rewards) and all(
                _equal(observation, twin_observation)
                for observation, twin_observation in zip(episode.observations, twin.observations, strict=True)
            )
            assert equal, "two runs with one seed and the same actions must give equal observations"
            assert torch.equal(torch.stack(episode.rewards), torch.stack(twin.rewards)), (
                "two runs with one seed and the same actions must give equal rewards"
            )


def _check_lengths(env: TorchVectorEnv, episodes: list[list[_Episode]]) -> None:
    """Check that episodes take as many actions as the environment says."""
    for length in {len(episode.rewards) for lane in episodes for episode in lane}:
        if env.num_steps is not None:
            assert length == env.num_steps, f"num_steps is {env.num_steps}, but an episode took {length} actions"
        if env.max_steps is not None:
            assert length <= env.max_steps, f"max_steps is {env.max_steps}, but an episode took {length} actions"


def _check_next_episode(env: VectorEnv, started: list[_Episode], *, max_steps: int) -> None:
    """Check that autoreset started the same episodes that a reset in its place would have started."""
    env.reset(seed=7)
    played = _play(env, env.reset(), max_steps=max_steps, first_episode=1, num_episodes=1)
    for episode, (expected, *_) in zip(started, played, strict=True):
        length, allowed = len(episode.rewards), len(expected.rewards)
        assert length == allowed, f"an episode after autoreset took {length} steps, but {allowed} after a reset"
        pairs = zip(episode.observations, expected.observations, strict=True)
        assert all(_close(*pair) for pair in pairs), "an episode after autoreset must be as one after a reset"
        rewards = ({"": torch.stack(played_episode.rewards)} for played_episode in (episode, expected))
        assert _close(*rewards), "an episode after autoreset must earn as one after a reset"


def _check_partial_reset(env: VectorEnv) -> None:
    """Check that a masked reset changes only the lanes of the mask, and not what the others draw later."""
    before, _ = env.reset(seed=3)
    if env.num_envs < 2:
        return
    undisturbed, _ = env.reset()
    env.reset(seed=3)
    mask = np.zeros(env.num_envs, dtype=bool)
    mask[0] = True
    options = {"reset_mask": mask}
    after, _ = env.reset(seed=99, options=options)
    assert "reset_mask" in options, "reset must not change the caller's options"
    assert not _equal(_row(after, 0), _row(before, 0)), "the masked lane must be reset"
    for key in before:
        assert torch.equal(after[key][1:], before[key][1:]), f"{key!r} of a lane outside the mask was changed"
    again, _ = env.reset(seed=99, options={"reset_mask": torch.from_numpy(mask)})
    assert _equal(_row(again, 0), _row(after, 0)), "torch and numpy masks must do the same"
    later, _ = env.reset()
    for lane in range(1, env.num_envs):
        same = _equal(_row(later, lane), _row(undisturbed, lane))
        assert same, "a masked reset must not seed lanes outside the mask"


def _check_rest(env: VectorEnv, *, max_steps: int) -> None:
    """Check that in DISABLED a lane that ended rests while others go on."""
    observation, _ = env.reset(seed=5)
    mask = np.arange(env.num_envs) == 0
    ended = np.zeros(env.num_envs, dtype=bool)
    for step in range(max_steps):
        if step == 1 and not ended.any():  # lane 0 is a step behind the others
            observation, _ = env.reset(options={"reset_mask": mask})
        observation, _, _, _, info = env.step(_actions(env, observation, [(0, step)] * env.num_envs))
        ended = info["ended"]
        if ended.any():
            break
    if ended.all():
        return
    rested, reward, still, _, _ = env.step(_actions(env, observation, [(1, 0)] * env.num_envs))
    for lane in np.flatnonzero(ended).tolist():
        assert still[lane], "a lane that ended must stay ended until it is reset"
        assert reward[lane] == 0, "a lane that ended must earn nothing"
        assert _equal(_row(rested, lane), _row(observation, lane)), "a lane that ended must rest"


def _check_closing(env: VectorEnv) -> None:
    """Check that closing twice is harmless, and that a closed environment is not used."""
    observation, _ = env.reset(seed=7)
    action = _actions(env, observation, [(0, 0)] * env.num_envs)
    env.close()
    env.close()
    calls: dict[str, Callable[[], object]] = {"reset": env.reset, "step": lambda: env.step(action)}
    for name, call in calls.items():
        try:
            call()
        except ClosedEnvironmentError:
            continue
        raise AssertionError(f"{name} after close() must raise ClosedEnvironmentError")
