"""The check of a vector environment: Gymnasium checks single ones (`check_env`), and has none for these."""

import numbers
from collections.abc import Callable

from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from ..envs.contract import TorchVectorEnv
from . import torch_contract
from .comparisons import (
    check_another,
    check_ends,
    check_ignored_action,
    check_independence,
    check_next_episode,
    check_single,
    check_twin,
)
from .report import Findings, Report, fault
from .resets import check_closing, check_partial_reset, check_rest
from .seeds import check_seeds, check_seeds_of_lanes
from .subject import Run, Subject

_MEMBERS = "members of a TorchVectorEnv"
_TWIN = "the same seed and actions: the same episodes, to the last bit"
_OF_THE_START = {"seeds": check_seeds, "seeds of lanes": check_seeds_of_lanes}
_OF_EPISODES = {
    "an episode after autoreset is as one after a reset": check_next_episode,
    "another environment made like it does the same": check_another,
    "the single environment does the same, final observation and info too": check_single,
}


def check_vector_env(
    env: VectorEnv,
    *,
    twin: Callable[[], VectorEnv] | None = None,
    max_steps: int = 1000,
    strict: bool = False,
) -> Report:
    """Check that a vector environment keeps Gymnasium's contract in its own autoreset mode, and report on the rest.

    It plays about a dozen episodes in every lane, with random actions that depend on the lane, episode and step alone:

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
    findings = Findings(f"{env}, {mode.name}")
    with findings.checking("spaces"):
        _check_spaces(env)
    if isinstance(env.unwrapped, TorchVectorEnv):
        with findings.checking(_MEMBERS):
            torch_contract.check_members(env.unwrapped)
    subject = Subject(env, findings, twin=twin, max_steps=max_steps)
    if subject.contract is None and subject.player.like is not None:
        findings.cannot(_MEMBERS, torch_contract.lacking(env.unwrapped))
    _check_all(subject)
    return findings.report(strict=strict)


def _check_spaces(env: VectorEnv) -> None:
    if not isinstance(env.num_envs, numbers.Integral) or env.num_envs < 1:
        raise fault(f"must be an integer above 0, got {env.num_envs!r}", key="num_envs")
    for kind in ("observation", "action"):
        batched, single = getattr(env, f"{kind}_space"), getattr(env, f"single_{kind}_space")
        expected = batch_space(single, env.num_envs)
        is_alike = (type(batched), batched.shape, batched.dtype) == (type(expected), expected.shape, expected.dtype)
        if not is_alike:  # the bounds of lanes may differ
            raise fault(f"must be single_{kind}_space, {env.num_envs} times; got {batched!r:.200}", key=f"{kind}_space")


def _check_all(subject: Subject) -> None:
    """Make all checks but those of spaces and members, and close the environment."""
    findings, mode = subject.findings, subject.player.mode
    for name, check_start in _OF_THE_START.items():
        with findings.checking(name):
            check_start(subject, name)
    with findings.checking(f"every return, and {mode.name}, in two episodes of every lane"):
        episodes = subject.play()
        check_ends(subject, episodes)
    if subject.player.pays_integers:
        subject.leave_open("rewards are floating-point numbers", "they are integers, which cut off what is added")
    with findings.checking(_TWIN):
        is_deterministic = check_twin(subject, _TWIN, episodes)
    if is_deterministic:
        _check_episodes(subject, episodes)
    with findings.checking("resets of some lanes"):
        check_partial_reset(subject, "resets of some lanes")
    if subject.contract is not None:
        torch_contract.check_lengths(subject.contract, {len(episode.rewards) for lane in episodes for episode in lane})
        if mode is AutoresetMode.DISABLED and subject.env.num_envs > 1:
            check_rest(subject)
    with findings.checking("closing"):
        check_closing(subject, "closing")


def _check_episodes(subject: Subject, episodes: Run) -> None:
    """Make the checks that compare episodes with others that must be the same."""
    with subject.findings.checking("lanes do not depend on each other"):
        check_independence(subject, "lanes do not depend on each other", episodes)
    if subject.player.mode is AutoresetMode.NEXT_STEP:
        with subject.findings.checking("the action of a step that resets is ignored"):
            check_ignored_action(subject, episodes)
    for name, check in _OF_EPISODES.items():
        with subject.findings.checking(name):
            check(subject, name, episodes)
