"""Comparisons of an environment's episodes with others that must be the same."""

import copy
import numbers
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from .data import difference, is_continuous, is_equal, on_host, row_of_one
from .playing import Episode, Player, unlike
from .report import fault
from .subject import OTHER_SEED, SEED, Run, Subject, first_difference, said

_OF_VECTORS = ("num_envs", "vectorization_mode", "vector_kwargs", "autoreset_mode")


def check_ends(subject: Subject, episodes: Run) -> None:
    """Check that the last observation of an episode is neither the one before nor the next one's first."""
    mode = subject.player.mode.name
    pairs = [(lane[0], lane[1]) for lane in episodes]
    one = pairs[0][0]
    is_next = all(is_equal(one.rows[-1], two.rows[0]) for one, two in pairs)
    if is_next and not any(is_equal(one.rows[0], one.rows[-1]) for one, _ in pairs):
        what = f"{mode}: the last observation of each episode is the next one's first"
        raise fault(what, step=one.calls[-1], lane=0)
    moved, stays = [], []
    for episode in (episode for lane in episodes for episode in lane):
        moves = [not is_equal(*pair) for pair in zip(episode.rows[:-1], episode.rows[1:], strict=True)]
        moved += moves[:-1]
        stays.append(not moves[-1])
    if moved and all(moved) and all(stays) and is_continuous(subject.player.space):
        what = f"{mode}: the last observation of each episode is the one before its last step"
        raise fault(what, step=one.calls[-1], lane=0)


def check_twin(subject: Subject, name: str, episodes: Run) -> bool:
    """Check that the seed decides everything, whoever draws from the global generators; return whether it does."""
    what = "two runs with one seed and the same actions"
    error = first_difference(subject.play(disturb=True), episodes, what)
    if error is None:
        return True
    if subject.env.spec is not None and subject.env.spec.nondeterministic:
        subject.findings.cannot(name, "the spec says nondeterministic, and it is")
        return False
    if first_difference(subject.play(), episodes, what) is None:
        raise AssertionError(f"{error}: it draws from a global generator of Python, NumPy or torch")
    raise error


def check_ignored_action(subject: Subject, episodes: Run) -> None:
    """Check that in NEXT_STEP a step that resets a lane ignores its action."""
    run = subject.play(vary_ignored=True)
    error = first_difference(run, episodes, "the step that resets must ignore its action")
    if error is not None:
        raise error


def check_independence(subject: Subject, name: str, episodes: Run) -> None:
    """Check that a lane's episode does not depend on what others do; and, where promised, neither do later ones."""
    if subject.env.num_envs == 1:
        return subject.findings.cannot(name, "it has one lane")
    run = subject.play(varied_lanes=tuple(range(1, subject.env.num_envs, 2)))
    for episode, what in (
        (0, "a lane must not depend on the actions of others"),
        (1, "a later episode depends on others"),
    ):
        for lane in range(0, subject.env.num_envs, 2):
            error = unlike(run[lane][episode], episodes[lane][episode], what, tolerance=subject.tolerance)
            if error is not None and episode == 0:
                raise error
            if error is not None:
                return subject.leave_open("lanes draw from streams of their own", str(error))
    return None


def check_next_episode(subject: Subject, name: str, episodes: Run) -> None:
    """Check that autoreset starts the same episodes that a reset in its place would have started."""
    reason = _why_not_compared(subject, subject.player, episodes)
    if reason and subject.contract is not None:
        raise AssertionError(f"{name}: {reason}")
    if reason and subject.is_bare:
        spec = copy.deepcopy(subject.env.spec)  # lanes may share random numbers: one lane has them for itself
        assert spec is not None
        spec.kwargs["num_envs"] = 1
        one_lane = gym.make_vec(spec)
        player = Player(one_lane, max_steps=subject.max_steps)
        reason = _why_not_compared(subject, player, player.play(one_lane.reset(seed=SEED)))
        one_lane.close()
    if reason:
        subject.findings.cannot(name, reason)


def _why_not_compared(subject: Subject, player: Player, episodes: Run) -> str:
    """Compare each lane's second episode with one after a reset; return why they cannot be compared, or ""."""
    player.env.reset(seed=SEED)
    expected = player.play(player.env.reset(), first_episode=1, num_episodes=1)
    pairs = [(lane[1], other[0]) for lane, other in zip(episodes, expected, strict=True)]
    for got, other in pairs:
        if difference(got.rows[0], other.rows[0], tolerance=subject.tolerance):
            return (
                f"a reset in its place starts another one (lane {got.lane}): "
                "steps draw random numbers, or lanes share them"
            )
    if not (subject.varies and is_continuous(player.space)):
        runs = [player.play(player.env.reset(seed=seed), num_episodes=1) for seed in (SEED, OTHER_SEED)]
        if first_difference(runs[0], runs[1], "") is not None:
            return "first observations agree too easily to tell whether the random numbers do"
    for got, other in pairs:
        what = "an episode after autoreset must be as one after a reset"
        error = unlike(got, other, what, tolerance=subject.tolerance)
        if error is not None:
            raise error
    return ""


def check_another(subject: Subject, name: str, episodes: Run) -> None:
    """Check that another environment made like it does the same: nothing is shared between the two."""
    try:
        other = _another(subject)
    except Exception as error:
        return subject.findings.cannot(name, f"making it raises {said(error)}; give twin=")
    run = Player(other, max_steps=subject.max_steps).play(other.reset(seed=SEED))
    other.close()
    differs = first_difference(run, episodes, "another environment made like it must do the same")
    if differs is not None:
        raise differs
    return None


def _another(subject: Subject) -> VectorEnv:
    if subject.twin is not None:
        return subject.twin()
    if subject.is_bare:
        return gym.make_vec(subject.env.spec)  # type: ignore[arg-type]
    return cloudpickle.loads(cloudpickle.dumps(subject.env))


def check_single(subject: Subject, name: str, episodes: Run) -> None:
    """Check that each lane's first episode is that of the single environment of the spec, where it starts alike."""
    spec = subject.env.spec
    if spec is None or not subject.is_bare:
        return subject.findings.cannot(name, "it has no spec" if spec is None else "it is wrapped")
    keywords = {key: value for key, value in spec.kwargs.items() if key not in _OF_VECTORS}
    try:
        single = gym.make(spec.id, **keywords)
        lanes = [_alone(subject, single, lane) for lane in range(subject.env.num_envs)]
        single.close()
    except Exception as error:
        return subject.findings.cannot(name, f"the single environment raises {said(error)}")
    for alone, (episode, *_) in zip(lanes, episodes, strict=True):
        if difference(episode.rows[0], alone.rows[0], tolerance=subject.tolerance):
            return subject.findings.cannot(name, f"with one seed it starts elsewhere (lane {alone.lane})")
        what = "a lane must do as the single environment"
        differs = unlike(episode, alone, what, tolerance=subject.tolerance)
        if differs is not None and subject.varies and is_continuous(subject.player.space):
            raise differs
        if differs is not None:
            return subject.findings.cannot(name, f"they differ, perhaps in their random numbers: {differs}")
        _compare_info(subject, episode, alone)
    return None


def _alone(subject: Subject, single: gym.Env, lane: int) -> Episode:
    """Return the first episode of a lane, as the single environment plays it."""
    space = subject.player.space
    observation, info = single.reset(seed=SEED + lane)
    episode = Episode(lane, [row_of_one(space, observation)])
    while not any(episode.flags) and len(episode.rewards) < subject.max_steps:
        action = subject.player.action((lane, 0, len(episode.rewards), 0))
        observation, reward, terminated, truncated, info = single.step(action)
        episode.rows.append(row_of_one(space, observation))
        episode.rewards.append(float(reward))
        episode.calls.append(len(episode.rewards))
        episode.flags, episode.info = (bool(terminated), bool(truncated)), info
    return episode


def _compare_info(subject: Subject, episode: Episode, alone: Episode) -> None:
    """Check that the info of an episode's last step has what the single environment's has."""
    name = "info['final_info']" if subject.player.mode is AutoresetMode.SAME_STEP else "info"
    where: dict[str, Any] = {"step": episode.calls[-1], "lane": episode.lane}
    for key, value in alone.info.items():
        if key not in episode.info:
            raise fault(f"lacks {key!r}, which the single environment's has", key=name, **where)
        if isinstance(value, numbers.Number | np.ndarray | np.generic):
            got = np.asarray(on_host(episode.info[key])[episode.lane])
            found = difference({name: got}, {name: np.asarray(value)}, tolerance=subject.tolerance)
            if found:
                raise fault(f"{found[1]}, as in the single environment", key=f"{name}[{key!r}]", **where)
