"""Nothing that happens to a training, to its process or to its files is lost or goes unsaid."""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import stat
import sys
import time
import warnings
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure

import diffusion_gym  # noqa: F401
from agents import DDPOIS, RLOO, RWR, AdamW, Checkpoints, DenoisingPolicy, DiffusionNFT, PerPrompt, Rollouts
from agents.runs.manifest import MANIFEST_FILE, find_damage

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["agents", "diffusion_gym.models", "diffusion_gym.models.mixture", "pytest"])

LANES, STEPS = 4, 3
PER_ITERATION = LANES * STEPS
FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def falling(remaining):
    return 1e-3 * remaining**2


KINDS = {
    "DDPOIS": (DDPOIS, {"advantages": PerPrompt(8, 2), "optimizer": AdamW(ema_decay=0.9)}),
    "RLOO": (RLOO, {"rollouts": Rollouts(LANES, 2, same_noise=True), "optimizer": AdamW(ema_decay=0.9)}),
    "RWR": (RWR, {"n_epochs": 2}),
    "NFT": (DiffusionNFT, {"rollouts": Rollouts(LANES, 4), "optimizer": AdamW(ema_decay=0.5)}),
}


def make_env():
    arguments = {"model": "mixture", "num_steps": STEPS, "reward": "brightness", "prompts": ["anything", "north"]}
    return gym.make_vec("DenoisingMDP-v0", num_envs=LANES, autoreset_mode="DISABLED", **arguments)


def make(kind="DDPOIS", **arguments):
    algorithm, own = KINDS[kind]
    env = make_env()
    shared = {"learning_rate": falling, "rollouts": Rollouts(LANES), "batch_size": 2, "seed": 3}
    return algorithm(DenoisingPolicy(env.unwrapped.model, seed=0), env, **{**shared, **own, **arguments})


def train(folder, kind, iterations, every=1):
    """Begin a training or go on with it: what a user's script does each time it is started."""
    checkpoints = Checkpoints(folder, every=every)
    algorithm = KINDS[kind][0]
    learner = algorithm.load(folder, make_env(), learning_rate=falling) if checkpoints.found() else make(kind)
    left = iterations * PER_ITERATION - learner.num_timesteps
    return learner.learn(left, checkpoints, log_interval=0, reset_num_timesteps=False)


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def manifest(folder, iteration):
    checkpoint = folder / f"iteration_{iteration:08d}"
    assert find_damage(checkpoint) is None
    return (checkpoint / MANIFEST_FILE).read_text()


# a process that is killed
def kill_at_file_operation(folder, count):
    """Kill this process just before it does anything to a file or folder within `folder` for the count-th time."""
    left = [count]

    def hook(event, arguments):
        if event in FILE_EVENTS and str(folder) in str(arguments[0]):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def train_until_killed(folder, kind, iterations, every, begun, file_operation):
    torch.set_num_threads(1)
    if file_operation is not None:
        kill_at_file_operation(folder, file_operation)
    begun.set()
    train(folder, kind, iterations, every)


def killed_training(folder, kind, iterations, *, kills, rng):
    """Train in processes of which all but the last are killed; return what each kill left.

    Every other one is killed at a random operation on its checkpoints' files (writing, syncing, renaming, removing),
    the rest at a random time after they begin. (Before they save, they read: about 40 operations.)
    """
    left = []
    for attempt in range(kills + 1):
        last = attempt == kills
        operation = rng.randrange(50, 150) if attempt % 2 == 0 and not last else None
        begun, every = FORKSERVER.Event(), 10 if last else 1
        arguments = (folder, kind, iterations, every, begun, operation)
        process = FORKSERVER.Process(target=train_until_killed, args=arguments)
        process.start()
        assert begun.wait(60)
        if operation is None and not last:
            time.sleep(rng.uniform(0.05, 0.2))
            process.kill()
        process.join(60)
        assert process.exitcode == (0 if last else -signal.SIGKILL)
        left.append(names(folder) if folder.exists() else [])
    return left[:-1]


@pytest.mark.parametrize(("kind", "kills"), [("DDPOIS", 10), ("RLOO", 3), ("RWR", 3), ("NFT", 3)])
def test_a_killed_and_resumed_training_equals_an_uninterrupted_one_bit_for_bit(tmp_path, kind, kills):
    """Weights, averaged weights, optimizer, statistics and counters: all files of the last checkpoint are the same."""
    iterations = 10 * kills
    uninterrupted = train(tmp_path / "whole", kind, iterations, every=iterations)
    left = killed_training(tmp_path / "killed", kind, iterations, kills=kills, rng=random.Random(kills))
    assert len(left) == kills
    assert not any(name.endswith(f"{iterations:08d}") for found in left for name in found)
    assert sum(any(name.endswith(".partial") for name in found) for found in left) >= kills // 4
    assert len({max(found, default="") for found in left}) >= kills // 2  # it went on in between
    assert manifest(tmp_path / "killed", iterations) == manifest(tmp_path / "whole", iterations)
    again = type(uninterrupted).load(tmp_path / "killed", make_env(), learning_rate=falling)
    for one, other in zip(again.policy.parameters(), uninterrupted.policy.parameters(), strict=True):
        assert torch.equal(one, other)
    assert again.num_timesteps == iterations * PER_ITERATION


class Stop(BaseCallback):
    """End the training in the middle of an iteration, as a kill would."""

    def __init__(self, iteration):
        super().__init__()
        self.iteration = iteration

    def _on_step(self):
        return self.model.iteration < self.iteration


def test_a_run_goes_on_to_the_planned_total_with_the_schedules_rates(tmp_path):
    rates = []

    def schedule(remaining):
        rates.append(remaining)
        return falling(remaining)

    whole = make(learning_rate=schedule).learn(5 * PER_ITERATION, log_interval=0)
    expected, rates[:] = rates[1:], []  # the first one is the constructor's
    make(learning_rate=schedule).learn(5 * PER_ITERATION, [Stop(2), Checkpoints(tmp_path)], log_interval=0)
    half, rates[:] = rates[1:], []
    resumed = DDPOIS.load(tmp_path, make_env(), learning_rate=schedule)
    resumed.learn(5 * PER_ITERATION - resumed.num_timesteps, reset_num_timesteps=False, log_interval=0)
    assert half + rates[1:] == expected
    for one, other in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(one, other)


# files that are damaged
@pytest.fixture
def saved(tmp_path):
    """Return a folder with the checkpoints of iterations 1 to 3."""
    train(tmp_path / "run", "DDPOIS", 3)
    return tmp_path / "run"


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position % len(content)] ^= 1 << (position % 8)
    file.write_bytes(content)


def load(folder):
    return DDPOIS.load(folder, make_env(), learning_rate=falling)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: os.truncate(c / "optimizer.safetensors", 100), "optimizer.safetensors has 100 bytes instead of"),
        (lambda c: (c / "denoiser" / "config.json").unlink(), "denoiser/config.json is missing"),
        (lambda c: flip(c / "averaged_weights.safetensors", -5), "content of averaged_weights.safetensors is not what"),
        (lambda c: (c / MANIFEST_FILE).unlink(), f"it has no {MANIFEST_FILE}"),
        (lambda c: os.truncate(c / MANIFEST_FILE, 50), f"its {MANIFEST_FILE} cannot be read"),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(saved, damage, message):
    damage(saved / "iteration_00000003")
    with pytest.warns(UserWarning, match=f"iteration_00000003 is damaged: .*{message}"):
        learner = load(saved)
    assert learner.iteration == 2
    with pytest.raises(ValueError, match=f"iteration_00000003 is not a whole checkpoint: .*{message}"):
        load(saved / "iteration_00000003")


def test_what_was_found_is_listed_when_no_checkpoint_is_whole(saved):
    for iteration in (1, 2, 3):
        (saved / f"iteration_0000000{iteration}" / "training_state.json").unlink()
    with pytest.raises(ValueError, match="none of the 3 checkpoints") as caught:
        load(saved)
    lines = str(caught.value).splitlines()[1:]
    assert lines == [f"  iteration_0000000{iteration}: training_state.json is missing" for iteration in (3, 2, 1)]


def test_a_folder_without_a_checkpoint_is_no_saved_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no saved run"):
        load(tmp_path)
    assert Checkpoints(tmp_path / "nothing").found() == []


def test_training_goes_on_past_a_damaged_checkpoint_and_replaces_it(saved):
    expected = manifest(saved, 3)
    (saved / "iteration_00000003" / "policy.json").unlink()
    with pytest.warns(UserWarning, match="policy.json is missing"):
        train(saved, "DDPOIS", 3)
    assert manifest(saved, 3) == expected


# which are kept
def test_the_newest_are_kept_also_the_one_at_the_end(tmp_path):
    learner = make()
    learner.learn(11 * PER_ITERATION, Checkpoints(tmp_path, every=2, keep=3), log_interval=0)
    assert names(tmp_path) == ["iteration_00000008", "iteration_00000010", "iteration_00000011"]
    learner.learn(0, Checkpoints(tmp_path, every=2, keep=1), reset_num_timesteps=False)
    assert len(names(tmp_path)) == 3  # nothing was learnt, nothing is written


def test_an_old_checkpoint_goes_only_when_the_new_one_is_safe(tmp_path, monkeypatch):
    seen = []
    save = DDPOIS.save

    def watched(self, path):
        save(self, path)
        seen.append(names(tmp_path))

    monkeypatch.setattr(DDPOIS, "save", watched)
    make().learn(4 * PER_ITERATION, Checkpoints(tmp_path, keep=2), log_interval=0)
    assert [len(found) for found in seen] == [1, 2, 3, 3]


def test_damaged_checkpoints_are_not_counted(saved):
    (saved / "iteration_00000002" / "policy.json").unlink()
    learner = load(saved)
    learner.learn(PER_ITERATION, Checkpoints(saved, keep=3), log_interval=0, reset_num_timesteps=False)
    assert names(saved) == [f"iteration_0000000{iteration}" for iteration in (1, 2, 3, 4)]
    learner.learn(PER_ITERATION, Checkpoints(saved, keep=3), log_interval=0, reset_num_timesteps=False)
    assert names(saved) == [f"iteration_0000000{iteration}" for iteration in (3, 4, 5)]


def test_leftovers_of_a_killed_save_are_removed(saved):
    shutil.copytree(saved / "iteration_00000003", saved / "iteration_00000004.partial")
    (saved / "iteration_00000003").rename(saved / "iteration_00000003.previous")
    (saved / "mine.partial").mkdir()
    assert [path.name[-1] for path in Checkpoints(saved).found()] == ["1", "2"]
    learner = load(saved)
    assert learner.iteration == 2
    with pytest.raises(ValueError, match="a checkpoint of iteration 3, and this run is at 2"):
        learner.learn(PER_ITERATION, Checkpoints(saved), reset_num_timesteps=False)
    assert names(saved) == [*(f"iteration_0000000{iteration}" for iteration in (1, 2, 3)), "mine.partial"]


def test_another_runs_checkpoints_are_not_mixed_with_this_ones(saved):
    with pytest.raises(ValueError, match=r"has a checkpoint of iteration 3, and this run is at 0: .* DDPOIS.load"):
        make().learn(PER_ITERATION, Checkpoints(saved))
    assert len(names(saved)) == 3


@pytest.mark.parametrize("arguments", [{"every": 0}, {"keep": 0}])
def test_wrong_arguments_are_named(tmp_path, arguments):
    with pytest.raises(ValueError, match="every and keep must be at least 1"):
        Checkpoints(tmp_path, **arguments)


# disks that know no sync, and hashes that take minutes
@pytest.mark.parametrize("kinds", [stat.S_ISDIR, stat.S_ISREG, lambda _: True])
def test_runs_are_saved_where_disks_know_no_sync(tmp_path, monkeypatch, kinds):
    fsync = os.fsync

    def refuse(descriptor):
        if kinds(os.fstat(descriptor).st_mode):
            raise OSError(22, os.strerror(22))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    checkpoints = Checkpoints(tmp_path / "run")
    make().learn(2 * PER_ITERATION, checkpoints, log_interval=0)
    assert (len(checkpoints.found()), checkpoints.failed) == (2, 0)
    assert load(tmp_path / "run").iteration == 2


def test_contents_of_older_checkpoints_are_not_read_again_when_a_training_starts(tmp_path, monkeypatch):
    run = make()
    run.learn(2 * PER_ITERATION, Checkpoints(tmp_path / "run"), log_interval=0)
    hashed = []
    monkeypatch.setattr("agents.runs.manifest._sha256", lambda file: hashed.append(file))
    run.learn(0, Checkpoints(tmp_path / "run"), reset_num_timesteps=False, log_interval=0)
    assert hashed == []


# a disk that is full
class FullDisk(BaseCallback):
    """Let this process write no file above 4 kB from one iteration's end until another's."""

    def __init__(self, full, free):
        super().__init__()
        self.full, self.free = full, free

    def _on_rollout_start(self):
        limit = 4096 if self.full <= self.model.iteration < self.free else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def _on_step(self):
        return True


def train_on_a_full_disk(folder, results):
    torch.set_num_threads(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learner = make()
        learner.set_logger(configure(str(folder / "log"), ["csv"]))
        checkpoints = Checkpoints(folder / "run", keep=2)
        learner.learn(7 * PER_ITERATION, [FullDisk(3, 5), checkpoints])
        learner.logger.close()
    messages = [str(warning.message) for warning in caught if "checkpoint" in str(warning.message)]
    results.put((learner.iteration, checkpoints.failed, messages, names(folder / "run")))


def test_training_goes_on_when_the_disk_is_full(tmp_path):
    """The kernel refuses to write, safetensors' Rust code too."""
    results = FORKSERVER.SimpleQueue()
    process = FORKSERVER.Process(target=train_on_a_full_disk, args=(tmp_path, results))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    iteration, failed, messages, kept = results.get()
    assert (iteration, failed) == (7, 2)
    assert ["iteration_00000003" in messages[0], "iteration_00000004" in messages[1]] == [True, True]
    assert all("File too large" in message and "training" in message for message in messages)
    assert kept == ["iteration_00000006", "iteration_00000007"]
    header, *rows = (line.split(",") for line in (tmp_path / "log" / "progress.csv").read_text().splitlines())
    assert [row[header.index("checkpoint/failed")] for row in rows] == ["", "0", "0", "1", "2", "2", "2"]


def test_a_full_disk_leaves_the_older_checkpoints(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    learner = make()
    learner.learn(2 * PER_ITERATION, Checkpoints(tmp_path, keep=1), log_interval=0)
    monkeypatch.setattr("agents.runs.files.save_optimizer", full)
    with pytest.warns(UserWarning, match="iteration_0000000.*No space left"):
        learner.learn(2 * PER_ITERATION, Checkpoints(tmp_path, keep=1), log_interval=0, reset_num_timesteps=False)
    assert names(tmp_path) == ["iteration_00000002"]
    assert load(tmp_path).iteration == 2


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("agents.runs.files.save_optimizer", lambda *_: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        make().learn(PER_ITERATION, Checkpoints(tmp_path), log_interval=0)
    assert names(tmp_path) == []
