"""Saving and loading of a run, as safetensors and JSON: nothing that could run code."""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gymnasium.vector import VectorEnv
from safetensors.torch import load_file, save_file

from diffusion_gym.envs.contract import TorchVectorEnv
from diffusion_gym.parts import Part, made

from ..experience.environment import torch_env
from ..logs.reports import environment_settings
from ..policies import Policy, load_policy
from ..policies.base import CONFIG_FILE, write_config
from .files import existing_folder, load_updates, replaced_folder, save_updates
from .manifest import whole_checkpoint, write_manifest

if TYPE_CHECKING:
    from ..training.algorithm import Algorithm
    from ..training.learner import Learner

Run = TypeVar("Run", bound="Algorithm")

STATE_FILE = "training_state.json"
_FURTHER_FILE = "training_state.safetensors"
_COUNTERS = ("iteration", "evaluation_queries")
# The number of lanes and where they are change no result that is more than rounding; prompts are compared as texts, and
# models by their weights.
_WITHOUT_EFFECT = (
    *("num_envs", "device", "offload", "autoreset_mode", "render_mode", "observe_embeds", "prompts", "model"),
)


def require_savable(algorithm: "Algorithm | Learner") -> None:
    """Raise TypeError if the constructor has arguments that `load_run` could not give it again."""
    arguments = inspect.signature(type(algorithm)).parameters.values()
    named = {one.name for one in arguments if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
    lost = sorted(named - {field.name for field in dataclasses.fields(algorithm)})
    if lost:
        raise TypeError(
            f"{type(algorithm).__name__} would be loaded without its own arguments {lost}: make them fields, with "
            "@dataclass(kw_only=True, eq=False, repr=False) above the class, and its constructor __post_init__"
        )


def save_run(algorithm: "Algorithm", path: str | Path) -> None:
    """Write the trained weights, and all else that is needed to go on, into a folder.

    The folder takes the place of an earlier one only when it is whole. `unet/` (or the LoRA file) in it opens in
    plain diffusers. A ".zip" at the end of `path`, which SB3's CheckpointCallback adds, is dropped. The
    main process alone writes, and does not wait for the others; call `processes.wait()` before another reads. Where
    processes share weights, all have to call it, for it gathers them.

    Raises:
        FileExistsError: there is a file at `path`.
        OSError: the disk is full, or the like; an earlier checkpoint at `path` is still there.
        TypeError: as `require_savable`.
        RuntimeError: the policy has its averaged weights: `policy.save` writes these. Or the disk refused, and other
            processes wait in vain: the run cannot go on.
    """
    updates = algorithm.updates
    if updates.average is not None and updates.average.is_applied:
        raise RuntimeError("within averaged_weights() the run cannot be saved: policy.save writes these weights")
    require_savable(algorithm)
    if not algorithm.processes.is_main and not algorithm.processes.share_weights:
        return
    with _folder_of(algorithm, _without_zip(path)) as folder:
        algorithm.policy.save(folder)
        if not (folder / CONFIG_FILE).exists():
            write_config(folder, algorithm.policy)
        for name, policy in algorithm.saved_policies().items():
            policy.save(folder / name)
        save_updates(updates, folder)
        if tensors := algorithm.tensors():
            save_file(tensors, folder / _FURTHER_FILE)
        text = json.dumps(_state_of(algorithm), indent=2, default=_plain)
        (folder / STATE_FILE).write_text(text)
        write_manifest(folder)


@contextlib.contextmanager
def _folder_of(algorithm: "Algorithm", path: Path) -> Iterator[Path]:
    """The folder that this process writes to: a passing one where it only gives its share to the main process."""
    if not algorithm.processes.is_main:
        with tempfile.TemporaryDirectory() as passing:
            yield Path(passing)
        return
    try:
        with replaced_folder(path) as folder:
            yield folder
    except OSError as error:
        if not algorithm.processes.share_weights:
            raise
        raise RuntimeError(f"{path} could not be written ({error}) while other processes gave their weights") from error


def _state_of(algorithm: "Algorithm") -> dict[str, Any]:
    """Return the state that a checkpoint holds beside weights, as JSON can hold it."""
    rate = algorithm.learning_rate
    return {
        "algorithm": type(algorithm).__name__,
        "hyperparameters": algorithm.hyperparameters(),
        "environment": environment_settings(algorithm.base_env),
        "told_apart_by": _identity_of(algorithm.base_env),
        "learning_rate": None if callable(rate) else rate,
        "seed": algorithm.run_seed,
        **({} if algorithm.tensorboard_log is None else {"log_identity": algorithm.log_identity}),
        **algorithm.counts_at_boundary,
        "num_updates": algorithm.num_updates,
        **{counter: getattr(algorithm, counter) for counter in _COUNTERS},
        "guard": algorithm.updates.guard.state_dict(),
        "reward": algorithm.reward_at_boundary,
        "extra": algorithm.state(),
        "callbacks": algorithm.callback_states,
    }


def load_run(
    cls: type[Run],
    path: str | Path,
    env: VectorEnv,
    *,
    policy: Policy | None,
    reference: Policy | None,
    changed: Mapping[str, Any],
    tensorboard_log: str | None,
    verbose: int,
) -> Run:
    """Return the run that `save_run` wrote; see `Algorithm.load`.

    Args:
        cls: The algorithm.
        path: The folder, or one of checkpoints.
        env: The environment to go on in.
        policy: The policy to read the weights into; None: made anew.
        reference: The policy that the KL divergence is to, if one was given.
        changed: Keywords that take the place of the saved ones.
        tensorboard_log: As in the constructor.
        verbose: As in the constructor.
    """
    base_env = torch_env(env)
    folder = whole_checkpoint(existing_folder(_without_zip(path)))
    state = json.loads((folder / STATE_FILE).read_text())
    if state["algorithm"] != cls.__name__:
        raise ValueError(f"{folder} is a run of {state['algorithm']}, not of {cls.__name__}")
    if changed.get("learning_rate", state["learning_rate"]) is None:
        raise ValueError(f"the learning rate of {folder} was a callable: give it again, load(..., learning_rate=…)")
    if policy is None:
        policy = load_policy(folder, model=base_env.model, device=base_env.device)
    else:
        policy.load_weights(folder)
    saved = {name: _remade(value) for name, value in state["hyperparameters"].items()}
    if reference is not None:
        if saved.get("kl") is None:
            raise ValueError(f"the run of {folder} has no KL divergence: reference= has no effect")
        if not state["extra"]["kl"]["reference_given"]:
            raise ValueError(
                f"the KL divergence of the run of {folder} is to its untrained policy, and another reference= would "
                "pull it elsewhere: leave it out"
            )
        saved["kl"] = dataclasses.replace(saved["kl"], reference=reference)
    keywords = {"learning_rate": state["learning_rate"], "seed": state["seed"], **saved, **changed}
    run = cls(policy, env, tensorboard_log=tensorboard_log, verbose=verbose, **keywords)
    _restore(run, folder, state)
    _warn_of_changes(folder, state, base_env)
    return run


def _remade(value: Any) -> Any:
    if isinstance(value, Mapping):
        return made(value, Part)
    return tuple(value) if isinstance(value, list) else value


def _restore(run: "Algorithm", folder: Path, state: Mapping[str, Any]) -> None:
    """Restore the state that `save_run` wrote, but for the constructor's arguments."""
    load_updates(run.updates, folder, state)
    run.base_env.reward.load_state_dict(state.get("reward", {}))
    run.num_timesteps, run.reward_queries = state["num_timesteps"], state["reward_queries"]
    run.mark_boundary()
    for counter in _COUNTERS:
        setattr(run, counter, state.get(counter, 0))
    run.log_identity = state.get("log_identity", run.log_identity)
    run.callback_states = state.get("callbacks", {})
    run.load_state(state["extra"])
    if run.tensors():
        run.load_tensors(load_file(folder / _FURTHER_FILE, device=str(run.device)))
    for name, policy in run.saved_policies().items():
        policy.load_weights(folder / name)


def _identity_of(env: TorchVectorEnv) -> dict[str, Any]:
    """Return an environment's identity beyond the arguments that it was made with, which may lack names."""
    texts = list(env.prompts)
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    return {
        "reward": env.reward.name,
        "number of prompts": len(texts),
        "SHA-256 of the prompts": digest,
        "dtype": str(env.dtype).removeprefix("torch."),
        "image_size": list(env.model.image_size),
    }


def _warn_of_changes(folder: Path, state: Mapping[str, Any], env: TorchVectorEnv) -> None:
    """Warn of differences to the environment that a run was saved in, where they change results."""
    defaults = {name: argument.default for name, argument in inspect.signature(type(env)).parameters.items()}
    identity_now = _identity_of(env)
    before, now = (
        {name: value for name, value in {**defaults, **settings}.items() if name not in _WITHOUT_EFFECT} | identity
        for settings, identity in (
            (state["environment"], state.get("told_apart_by", identity_now)),
            (environment_settings(env), identity_now),
        )
    )
    changes = [
        f"{name} is {now[name]!r}, and was {before[name]!r}"
        for name in sorted(before.keys() & now.keys())
        if before[name] != now[name]
    ]
    if changes:
        warnings.warn(
            f"the run of {folder} goes on in another environment: {'; '.join(changes)}. Its statistics, and its "
            "results so far, are of the other one",
            stacklevel=3,
        )


def _plain(value: Any) -> Any:
    """Return a numpy number as Python's."""
    return value.item()


def _without_zip(path: str | Path) -> Path:
    path = Path(path)
    return path.with_suffix("") if path.suffix == ".zip" else path
