"""The check of a vector environment: Gymnasium checks single ones (`check_env`), and has none for these."""

import copy
import numbers
from collections.abc import Callable
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import torch
from gymnasium.error import ClosedEnvironmentError
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from ..envs.contract import TorchVectorEnv
from . import torch_contract
from .data import Row, difference, is_continuous, is_equal, on_host, row_of, row_of_one
from .playing import Episode, Player, unlike
from .report import Findings, Report, fault

Run = list[list[Episode]]

_SEED, _OTHER_SEED, _MASKED_SEED = 7, 1_234_567, 99
_MEMBERS = "members of a TorchVectorEnv"
_OF_VECTORS = ("num_envs", "vectorization_mode", "vector_kwargs", "autoreset_mode")


def check_vector_env(
    env: VectorEnv,
    *,
    twin: Callable[[], VectorEnv] | None = None,
    max_steps: int = 1000,
    strict: bool = False,
) -> Report:
    """Check that a vector environment keeps Gymnasium's contract in its own autoreset mode, and report on the rest.

    It plays about sixteen episodes in every lane, with random actions that depend on the lane, episode and step alone:

    - Every return: structure, shapes, dtypes, bounds, device, finite rewards, masks of info; no memory is shared with
      an earlier return or with the action, and nothing that was returned changes later.
    - The seed decides everything: runs of two episodes are equal to the last bit, also while others draw from the
      global generators, and in another environment made like it. A reset without a seed draws another episode.
    - A lane's episode does not depend on what other lanes do.
    - The autoreset mode's promises at an episode's end, and that the next episode is as after a reset. Against the
      single environment of its spec, where it has one that starts alike: rewards, ends, last observation and info.
    - A reset of some lanes leaves the others alone.

    What Gymnasium leaves open is a weakness in the report: seeds for each lane, resets of some lanes outside DISABLED,
    streams of random numbers that lanes share, errors after `close`. A `TorchVectorEnv` promises it all, so there each
    is an error; so is what its members say. The environment is closed in the end.

    Args:
        env: A vector environment of NumPy arrays or torch tensors; wrappers around it are checked with it.
        twin: A function that makes another one like it; None: it is made from its spec, or by pickling.
        max_steps: Actions within which an episode must end under random play.
        strict: Weaknesses, and what cannot be checked, are errors, and a torch environment is a `TorchVectorEnv`.

    Returns:
        What holds, what need not hold and does not, and what could not be checked: `print` it.

    Raises:
        AssertionError: the contract is broken; the message says at which step, in which lane and in what, with what
            came and what was expected.
    """
    mode = env.metadata.get("autoreset_mode")
    if not isinstance(mode, AutoresetMode):
        raise fault(f"must be an AutoresetMode, got {mode!r}", key='metadata["autoreset_mode"]')
    check = _Check(env, Findings(f"{env}, {mode.name}"), twin=twin, max_steps=max_steps)
    check.run()
    return check.findings.report(strict=strict)


class _Check:
    """One check of one environment; the arguments are those of `check_vector_env`.

    Attributes:
        player: The player of the environment.
        varies: Whether the seed decides the first observation.
        tolerance: The difference that the same episode may have in another batch: networks round differently.
    """

    def __init__(
        self, env: VectorEnv, findings: Findings, *, twin: Callable[[], VectorEnv] | None, max_steps: int
    ) -> None:
        self.env, self.findings, self._twin, self._max_steps = env, findings, twin, max_steps
        with findings.checking("spaces"):
            self._check_spaces()
        if isinstance(env.unwrapped, TorchVectorEnv):
            with findings.checking(_MEMBERS):
                torch_contract.check_members(env.unwrapped)
        self.player = Player(env, max_steps=max_steps)
        self.contract = self.player.contract
        self.tolerance = 1e-5 if self.player.like is None else 1e-2
        self.varies = True

    def run(self) -> None:
        """Make all checks, and close the environment."""
        if self.contract is None and self.player.like is not None:
            self.findings.cannot(_MEMBERS, torch_contract.lacking(self.env.unwrapped))
        with self.findings.checking("seeds"):
            self._check_seeds()
        with self.findings.checking("seeds of lanes"):
            self._check_seeds_of_lanes()
        with self.findings.checking(f"every return, and {self.player.mode.name}, in two episodes of every lane"):
            episodes = self.player.play(self._reset(seed=_SEED))
            self._check_ends(episodes)
        if self.player.pays_integers:
            self._leave_open("rewards are floating-point numbers", "they are integers, which cut off what is added")
        with self.findings.checking("the same seed and actions: the same episodes, to the last bit"):
            is_deterministic = self._check_twin(episodes)
        if is_deterministic:
            self._check_episodes(episodes)
        with self.findings.checking("resets of some lanes"):
            self._check_partial_reset()
        if self.contract is not None:
            self._check_lengths(episodes)
            if self.player.mode is AutoresetMode.DISABLED and self.env.num_envs > 1:
                self._check_rest()
        with self.findings.checking("closing"):
            self._check_closing()

    def _check_episodes(self, episodes: Run) -> None:
        """Make the checks that compare an environment's episodes with others."""
        with self.findings.checking("lanes do not depend on each other"):
            self._check_independence(episodes)
        if self.player.mode is AutoresetMode.NEXT_STEP:
            with self.findings.checking("the action of a step that resets is ignored"):
                self._require_same(
                    self._play(vary_ignored=True), episodes, "the step that resets must ignore its action"
                )
        with self.findings.checking("an episode after autoreset is as one after a reset"):
            self._check_next_episode(episodes)
        with self.findings.checking("another environment made like it does the same"):
            self._check_another(episodes)
        with self.findings.checking("the single environment does the same, final observation and info too"):
            self._check_single(episodes)

    def _reset(self, **arguments: Any) -> tuple[Any, dict[str, Any]]:
        start = self.env.reset(**arguments)
        self.player.check_start(start)
        return start

    def _rows(self, observation: Any) -> list[Row]:
        return [row_of(self.player.space, observation, lane) for lane in range(self.env.num_envs)]

    def _play(self, **arguments: Any) -> Run:
        return self.player.play(self._reset(seed=_SEED), **arguments)

    def _leave_open(self, name: str, what: str) -> None:
        """Note what Gymnasium leaves open, but a `TorchVectorEnv` promises.

        Raises:
            AssertionError: it is one.
        """
        if self.contract is not None:
            raise AssertionError(f"{name}: {what}")
        self.findings.weakness(name, what)

    def _require_same(self, run: Run, expected: Run, what: str, *, tolerance: float = 0.0) -> None:
        error = _first_difference(run, expected, what, tolerance=tolerance)
        if error is not None:
            raise error

    def _check_spaces(self) -> None:
        num_envs = self.env.num_envs
        if not isinstance(num_envs, numbers.Integral) or num_envs < 1:
            raise fault(f"must be an integer above 0, got {num_envs!r}", key="num_envs")
        for kind in ("observation", "action"):
            batched, single = getattr(self.env, f"{kind}_space"), getattr(self.env, f"single_{kind}_space")
            expected = batch_space(single, num_envs)
            is_alike = (type(batched), batched.shape, batched.dtype) == (type(expected), expected.shape, expected.dtype)
            if not is_alike:  # the bounds of lanes may differ
                raise fault(f"must be single_{kind}_space, {num_envs} times; got {batched!r:.200}", key=f"{kind}_space")

    def _check_seeds(self) -> None:
        first, following, third, again, repeated, other = (
            self._rows(self._reset(**seed)[0])
            for seed in ({"seed": _SEED}, {}, {}, {"seed": _SEED}, {}, {"seed": _OTHER_SEED})
        )
        for lane in range(self.env.num_envs):
            for rows, expected, what in (
                (again, first, "two resets with one seed must give the same"),
                (repeated, following, "a reset without a seed must go on with the seeded stream"),
            ):
                found = difference(rows[lane], expected[lane])
                if found:
                    raise fault(f"{what}: {found[1]}", step=0, lane=lane, key=found[0])
        self.varies = any(not is_equal(*pair) for pair in zip(first, other, strict=True))
        if not self.varies:
            self._leave_open_start()
            return
        every = all if not is_continuous(self.player.space) else any
        for rows in (first, third):
            if every(is_equal(*pair) for pair in zip(rows, following, strict=True)):
                raise fault("a reset without a seed must draw another episode, got the same again", step=0)
        if self.env.num_envs > 1 and all(is_equal(row, rows[0]) for rows in (first, other) for row in rows):
            raise fault("lanes must be seeded differently, but all start alike", step=0)

    def _leave_open_start(self) -> None:
        if self.contract is not None:
            raise fault(f"the seeds {_SEED} and {_OTHER_SEED} must give different observations", step=0)
        self.findings.cannot("seeds", "the first observation is the same whatever the seed")

    def _check_seeds_of_lanes(self) -> None:
        name, expected = "seeds of lanes", self._rows(self._reset(seed=_SEED)[0])
        seeds = [_SEED + lane for lane in range(self.env.num_envs)]
        try:
            start = self._reset(seed=seeds)
        except Exception as error:
            return self._leave_open(name, f"reset(seed={seeds}) raises {_said(error)}")
        for lane, (row, other) in enumerate(zip(self._rows(start[0]), expected, strict=True)):
            found = difference(row, other)
            if found:
                what = f"reset(seed={_SEED}) must seed lane {lane} with {_SEED + lane}: {found[0]}: {found[1]}"
                return self._leave_open(name, what)
        return None

    def _check_ends(self, episodes: Run) -> None:
        """Check that the last observation of an episode is neither the one before nor the next one's first."""
        for lane, (one, two) in enumerate((lane[0], lane[1]) for lane in episodes):
            if not is_equal(one.rows[-1], two.rows[0]) or is_equal(one.rows[0], one.rows[-1]):
                break
        else:
            what = f"{self.player.mode.name}: the last observation of each episode is the next one's first"
            raise fault(what, step=one.calls[-1], lane=lane)
        all_episodes = [episode for lane in episodes for episode in lane]
        moved = [
            not is_equal(before, after)
            for episode in all_episodes
            for before, after in zip(episode.rows[:-2], episode.rows[1:-1], strict=True)
        ]
        stays = all(is_equal(*episode.rows[-2:]) for episode in all_episodes)
        if moved and all(moved) and stays and is_continuous(self.player.space):
            what = f"{self.player.mode.name}: the last observation of each episode is the one before its last step"
            raise fault(what, step=one.calls[-1], lane=lane)

    def _check_twin(self, episodes: Run) -> bool:
        """Check that the seed decides everything; return whether it does."""
        name = "the same seed and actions: the same episodes, to the last bit"
        error = _first_difference(self._play(disturb=True), episodes, "two runs with one seed and the same actions")
        if error is None:
            return True
        if self.env.spec is not None and self.env.spec.nondeterministic:
            self.findings.cannot(name, "the spec says nondeterministic, and it is")
            return False
        if _first_difference(self._play(), episodes, "") is None:
            raise AssertionError(f"{error}: it draws from a global generator of Python, NumPy or torch")
        raise error

    def _check_independence(self, episodes: Run) -> None:
        name = "lanes do not depend on each other"
        if self.env.num_envs == 1:
            return self.findings.cannot(name, "it has one lane")
        run = self._play(varied_lanes=tuple(range(1, self.env.num_envs, 2)))
        for lane in range(0, self.env.num_envs, 2):
            what = "a lane must not depend on the actions of others"
            error = unlike(run[lane][0], episodes[lane][0], what, tolerance=self.tolerance)
            if error is not None:
                raise error
        for lane in range(0, self.env.num_envs, 2):
            error = unlike(
                run[lane][1], episodes[lane][1], "a later episode depends on others", tolerance=self.tolerance
            )
            if error is not None:
                return self._leave_open("lanes draw from streams of their own", str(error))
        return None

    def _check_next_episode(self, episodes: Run) -> None:
        """Check that autoreset starts the same episodes that a reset in its place would have started."""
        name = "an episode after autoreset is as one after a reset"
        what = "an episode after autoreset must be as one after a reset"
        reason = self._next_episodes_differ(self.player, episodes, what)
        spec = self.env.spec
        if reason and self.contract is None and self.env.unwrapped is self.env and spec is not None:
            spec = copy.deepcopy(spec)  # lanes that share random numbers: one has them for itself
            spec.kwargs["num_envs"] = 1
            one_lane = gym.make_vec(spec)
            player = Player(one_lane, max_steps=self._max_steps)
            reason = self._next_episodes_differ(player, player.play(one_lane.reset(seed=_SEED)), what)
            one_lane.close()
        if reason:
            if self.contract is not None:
                raise AssertionError(f"{what}: {reason}")
            self.findings.cannot(name, reason)

    def _next_episodes_differ(self, player: Player, episodes: Run, what: str) -> str:
        """Compare each lane's second episode with one after a reset; return why they cannot be compared, or ""."""
        player.env.reset(seed=_SEED)
        expected = player.play(player.env.reset(), first_episode=1, num_episodes=1)
        pairs = [(lane[1], other[0]) for lane, other in zip(episodes, expected, strict=True)]
        alike = [difference(got.rows[0], other.rows[0], tolerance=self.tolerance) is None for got, other in pairs]
        if not all(alike):
            lane = alike.index(False)
            return (
                f"a reset in its place starts another one (lane {lane}): steps draw random numbers, or lanes share them"
            )
        if not (self.varies and is_continuous(player.space)) and not self._is_seedless(player):
            return "first observations agree too easily to tell whether the random numbers do"
        for got, other in pairs:
            error = unlike(got, other, what, tolerance=self.tolerance)
            if error is not None:
                raise error
        return ""

    def _is_seedless(self, player: Player) -> bool:
        """Return whether the seed decides nothing at all."""
        runs = [player.play(player.env.reset(seed=seed), num_episodes=1) for seed in (_SEED, _OTHER_SEED)]
        return _first_difference(*runs, "") is None

    def _check_another(self, episodes: Run) -> None:
        name = "another environment made like it does the same"
        try:
            other = self._another()
        except Exception as error:
            return self.findings.cannot(name, f"making it raises {_said(error)}; give twin=")
        run = Player(other, max_steps=self._max_steps).play(other.reset(seed=_SEED))
        other.close()
        self._require_same(run, episodes, "another environment made like it must do the same")
        return None

    def _another(self) -> VectorEnv:
        if self._twin is not None:
            return self._twin()
        if self.env.unwrapped is self.env and self.env.spec is not None:
            return gym.make_vec(self.env.spec)
        return cloudpickle.loads(cloudpickle.dumps(self.env))

    def _check_single(self, episodes: Run) -> None:
        name = "the single environment does the same, final observation and info too"
        spec = self.env.spec
        if self.env.unwrapped is not self.env or spec is None:
            return self.findings.cannot(name, "it is wrapped" if spec is not None else "it has no spec")
        keywords = {key: value for key, value in spec.kwargs.items() if key not in _OF_VECTORS}
        try:
            single = gym.make(spec.id, **keywords)
            lanes = self._lanes_alone(single)
            single.close()
        except Exception as error:
            return self.findings.cannot(name, f"gym.make raises {_said(error)}")
        what = "a lane must do as the single environment"
        for alone, (episode, *_) in zip(lanes, episodes, strict=True):
            if difference(episode.rows[0], alone.rows[0], tolerance=self.tolerance):
                return self.findings.cannot(name, f"with one seed it starts elsewhere (lane {alone.lane})")
            error = unlike(episode, alone, what, tolerance=self.tolerance)
            if error is not None and not (self.varies and is_continuous(self.player.space)):
                return self.findings.cannot(name, f"they differ, perhaps in their random numbers: {error}")
            if error is not None:
                raise error
            self._compare_info(episode, alone)
        return None

    def _lanes_alone(self, single: gym.Env) -> list[Episode]:
        """Return the first episode of every lane, as the single environment plays it."""
        space, lanes = self.player.space, []
        for lane in range(self.env.num_envs):
            observation, info = single.reset(seed=_SEED + lane)
            episode = Episode(lane, [row_of_one(space, observation)])
            while not any(episode.flags):
                action = self.player.action((lane, 0, len(episode.rewards), 0))
                observation, reward, terminated, truncated, info = single.step(action)
                episode.rows.append(row_of_one(space, observation))
                episode.rewards.append(float(reward))
                episode.calls.append(len(episode.rewards))
                episode.flags, episode.info = (bool(terminated), bool(truncated)), info
            lanes.append(episode)
        return lanes

    def _compare_info(self, episode: Episode, alone: Episode) -> None:
        """Check that the info of an episode's last step has what the single environment's has."""
        lane, step = episode.lane, episode.calls[-1]
        name = "info['final_info']" if self.player.mode is AutoresetMode.SAME_STEP else "info"
        for key, value in alone.info.items():
            if key not in episode.info:
                raise fault(f"lacks {key!r}, which the single environment's has", step=step, lane=lane, key=name)
            if isinstance(value, numbers.Number | np.ndarray | np.generic):
                got = on_host(episode.info[key])[lane]
                found = difference({name: np.asarray(got)}, {name: np.asarray(value)}, tolerance=self.tolerance)
                if found:
                    what = f"{found[1]}, as in the single environment"
                    raise fault(what, step=step, lane=lane, key=f"{name}[{key!r}]")

    def _check_partial_reset(self) -> None:
        name, lanes = "resets of some lanes", self.env.num_envs
        if lanes == 1:
            return self.findings.cannot(name, "it has one lane")
        must_hold = self.contract is not None or self.player.mode is AutoresetMode.DISABLED
        seeded = self._rows(self._reset(seed=_MASKED_SEED)[0])[0]
        before, expected = self._two_starts(None)
        mask = np.arange(lanes) == 0
        options = {"reset_mask": mask}
        try:
            after, later = self._two_starts(options)
        except Exception as error:
            if must_hold:
                raise
            return self._leave_open(name, f'options={{"reset_mask": …}} raises {_said(error)}')
        for lane in range(lanes):
            wanted, what = (
                (before[lane], "a reset of lane 0 must leave the others") if lane else (seeded, "must be reset")
            )
            found = difference(after[lane], wanted, tolerance=0.0 if lane else self.tolerance)
            if found:
                error = fault(f"{what}: {found[1]}", step=0, lane=lane, key=found[0])
                if must_hold:
                    raise error
                return self.findings.weakness(name, f'options={{"reset_mask": …}} is not followed: {error}')
        for lane in range(1, lanes):
            found = difference(later[lane], expected[lane])
            if found:
                what = f"lane {lane} draws another episode after a reset of lane 0: {found[0]}: {found[1]}"
                return self._leave_open("a reset of some lanes leaves the others' streams", what)
        if "reset_mask" not in options:
            self._leave_open("the caller's options are left alone", "reset takes reset_mask out of them")
        if self.contract is not None:
            again, _ = self._two_starts({"reset_mask": torch.from_numpy(mask)})
            if not is_equal(again[0], after[0]):
                raise fault("torch and numpy masks must do the same", step=0, lane=0)
        return self._check_partial_reset_while_playing(must_hold=must_hold)

    def _two_starts(self, options: dict[str, Any] | None) -> tuple[list[Row], list[Row]]:
        """Return the first observations after a reset, of some lanes where there are options; and those of the next."""
        rows = self._rows(self._reset(seed=3)[0])
        if options is not None:
            rows = self._rows(self._reset(seed=_MASKED_SEED, options=options)[0])
        return rows, self._rows(self._reset()[0])

    def _check_partial_reset_while_playing(self, *, must_hold: bool) -> None:
        """Check that lanes which are in an episode go on as if lane 0 had not been reset beside them."""
        runs = []
        for is_reset in (False, True):
            self._reset(seed=3)
            places = [[(lane, 0, step, 0) for lane in range(self.env.num_envs)] for step in range(2)]
            result = self.env.step(self.player.actions(places[0]))
            if (on_host(result[2]) | on_host(result[3])).any():
                return None
            if is_reset:
                self._reset(options={"reset_mask": np.arange(self.env.num_envs) == 0})
            observation, reward, *_ = self.env.step(self.player.actions(places[1]))
            runs.append(
                [row | {"reward": pay} for row, pay in zip(self._rows(observation), on_host(reward), strict=True)]
            )
        for lane in range(1, self.env.num_envs):
            found = difference(runs[1][lane], runs[0][lane], tolerance=self.tolerance)
            if found:
                error = fault(f"must not feel a reset of lane 0: {found[1]}", step=2, lane=lane, key=found[0])
                if must_hold:
                    raise error
                return self.findings.weakness("resets of some lanes", str(error))
        return None

    def _check_lengths(self, episodes: Run) -> None:
        """Check that episodes take as many actions as the environment says."""
        assert self.contract is not None
        for length in {len(episode.rewards) for lane in episodes for episode in lane}:
            if self.contract.num_steps is not None and length != self.contract.num_steps:
                raise fault(f"is {self.contract.num_steps}, but an episode took {length} actions", key="num_steps")
            if self.contract.max_steps is not None and length > self.contract.max_steps:
                raise fault(f"is {self.contract.max_steps}, but an episode took {length} actions", key="max_steps")

    def _check_rest(self) -> None:
        """Check that in DISABLED a lane that ended rests while others go on."""
        lanes, mask = self.env.num_envs, np.arange(self.env.num_envs) == 0
        self._reset(seed=5)
        ended, step = np.zeros(lanes, dtype=bool), 0
        while not ended.any() and step < self._max_steps:
            if step == 1:  # lane 0 is a step behind the others
                self._reset(options={"reset_mask": mask})
            action = self.player.actions([(lane, 0, step, 0) for lane in range(lanes)])
            observation, _, terminated, truncated, _ = self.env.step(action)
            ended, step = on_host(terminated) | on_host(truncated), step + 1
        if ended.all():
            return
        before = self._rows(observation)
        rested, reward, still, *_ = self.env.step(self.player.actions([(lane, 1, 0, 0) for lane in range(lanes)]))
        for lane in np.flatnonzero(ended).tolist():
            found = difference(self._rows(rested)[lane], before[lane])
            if found:
                raise fault(f"a lane that ended must rest: {found[1]}", step=step + 1, lane=lane, key=found[0])
            if not on_host(still)[lane] or on_host(reward)[lane] != 0:
                what = "a lane that ended must stay ended and earn nothing until it is reset"
                raise fault(what, step=step + 1, lane=lane)

    def _check_closing(self) -> None:
        """Check that closing twice is harmless, and that a closed environment is not used."""
        self._reset(seed=_SEED)
        action = self.player.actions([(lane, 0, 0, 0) for lane in range(self.env.num_envs)])
        self.env.close()
        self.env.close()
        if not self.env.closed:
            return self._leave_open("closing", "env.closed is not True after close()")
        calls: dict[str, Callable[[], object]] = {"reset": self.env.reset, "step": lambda: self.env.step(action)}
        for name, call in calls.items():
            try:
                call()
            except ClosedEnvironmentError:
                continue
            except Exception as error:
                return self._leave_open(
                    "closing", f"{name} after close() raises {_said(error)}, not ClosedEnvironmentError"
                )
            return self._leave_open("closing", f"{name} after close() does not raise ClosedEnvironmentError")
        return None


def _first_difference(run: Run, expected: Run, what: str, *, tolerance: float = 0.0) -> AssertionError | None:
    """Return the error that says where two runs differ first, of any lane; None where they do not."""
    for lane, other in zip(run, expected, strict=True):
        for got, episode in zip(lane, other, strict=False):
            error = unlike(got, episode, what, tolerance=tolerance)
            if error is not None:
                return error
    return None


def _said(error: Exception) -> str:
    return f"{type(error).__name__} ({error!s:.120})"
