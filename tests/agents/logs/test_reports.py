import time
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import HParam, Image, KVWriter, Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata as hparams

import diffusion_gym  # noqa: F401
from agents import (
    DDPOIS,
    DDPOSF,
    GRPO,
    KL,
    RLOO,
    RWR,
    AdamW,
    ContextFreeSchedule,
    DenoisingPolicy,
    Groups,
    Log,
    Muon,
    Noising,
    PerPrompt,
    Steps,
    Window,
)
from agents.logs import reports
from agents.logs.diagnostics import latent_diversity, prompt_table
from agents.training import policy_gradient
from diffusion_gym.models import load_model

PROMPTS = ["anything", "east", "west"]


class Recorder(KVWriter):
    """Keeps what the logger writes, pictures too."""

    def __init__(self):
        self.entries = []

    def write(self, key_values, key_excluded, step=0):
        self.entries.append({"step": step, **key_values})


@pytest.fixture(scope="module")
def model():
    return load_model("mixture")


def make(model, algorithm=DDPOIS, *, reward=None, samples=8, micro_batch_size=None, **arguments):
    """Return a small algorithm."""
    env = gym.make_vec(
        "DenoisingMDP-v0",
        num_envs=8,
        num_steps=3,
        model=model,
        reward=reward or (lambda images, *_: model.positions(images)[:, 0]),
        prompts=[PROMPTS[0], *model.names[:2]],
        autoreset_mode="DISABLED",
    )
    rollouts = replace(algorithm.rollouts, samples=samples, micro_batch_size=micro_batch_size)
    shared = {"rollouts": rollouts, "batch_size": 8, "learning_rate": 1e-3, "seed": 5}
    return algorithm(DenoisingPolicy(model, seed=0), env, **{**shared, **arguments})


def watched(learner):
    """Return the rollouts that a learner will learn from, in a list that fills."""
    rollouts, train = [], learner.train
    learner.train = lambda rollout: rollouts.append(rollout) or train(rollout)
    return rollouts


def learn(learner, iterations, **arguments):
    """Return what is written in that many iterations."""
    recorder = Recorder()
    learner.set_logger(Logger(None, [recorder]))
    learner.learn(iterations * learner.sizes.samples * 3, **arguments)
    return recorder.entries


def test_reward_statistics_are_numpys(model):
    learner = make(model, samples=16)
    rollouts = watched(learner)
    for entry, rollout in zip(learn(learner, 2), rollouts, strict=True):
        returns = rollout.returns.double().numpy()
        assert entry["rollout/ep_rew_mean"] == pytest.approx(returns.mean(), rel=1e-5)
        assert entry["rollout/ep_rew_std"] == pytest.approx(returns.std(), rel=1e-5)
        for percent in (5, 25, 50, 75, 95):
            expected = np.quantile(returns, percent / 100)
            assert entry[f"rollout/ep_rew_q{percent:02}"] == pytest.approx(expected, rel=1e-5)
        np.testing.assert_array_equal(entry["rollout/ep_rew"], rollout.returns.numpy())
        diversity = latent_diversity(rollout.actions[-1], rollout.prompt_id)
        assert entry["rollout/latent_diversity"] == pytest.approx(float(diversity))


def test_prompts_are_tabled_and_named_under_their_images(model, monkeypatch):
    drawn = []
    grid = reports.captioned_grid
    monkeypatch.setattr(reports, "captioned_grid", lambda *arguments: drawn.append(arguments) or grid(*arguments))
    learner = make(model)
    rollouts = watched(learner)
    (entry,) = learn(learner, 1)
    (rollout,) = rollouts
    texts = learner.env.unwrapped.prompts
    assert entry["rollout/prompts"] == prompt_table(rollout.returns.numpy(), rollout.prompt_id, texts)
    assert isinstance(entry["images/samples"], Image)
    ((images, captions),) = drawn
    assert torch.equal(images, rollout.images)
    assert [text for text, _ in captions] == [texts[index] for index in rollout.prompt_id]
    assert [float(reward) for _, reward in captions] == pytest.approx(rollout.returns.tolist(), rel=0.01)


def test_the_reward_under_an_image_has_its_unit(model, monkeypatch):
    drawn = []
    grid = reports.captioned_grid
    monkeypatch.setattr(reports, "captioned_grid", lambda *arguments: drawn.append(arguments) or grid(*arguments))
    learn(make(model, reward="compressibility"), 1)
    assert {reward.split(" ")[1] for _, reward in drawn[0][1]} == {"kB"}


@pytest.mark.filterwarnings("ignore:the ratio of a whole trajectory of latents")
@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [
        (DDPOIS, {"batch_size": 4}),
        (DDPOSF, {"batch_size": 4}),
        (GRPO, {"batch_size": 4}),
        (RLOO, {"batch_size": 4, "ratio": "step"}),
        (RLOO, {"batch_size": 4, "ratio": "trajectory"}),
    ],
)
def test_ratio_extremes_hold_all_ratios_of_all_updates(model, algorithm, arguments, monkeypatch):
    seen, original = [], policy_gradient.ratio_metrics
    monkeypatch.setattr(policy_gradient, "ratio_metrics", lambda logs: seen.append(torch.cat(logs)) or original(logs))
    (entry,) = learn(make(model, algorithm, micro_batch_size=5, **arguments), 1)
    per_update = 4 if arguments.get("ratio") == "trajectory" else 8  # the last of 3 steps has no density
    assert [len(logs) for logs in seen] == [per_update] * 2
    torch.testing.assert_close(seen[0], torch.zeros(per_update), rtol=0, atol=1e-5)
    logs = torch.cat(seen)
    assert entry["train/approx_kl"] == pytest.approx(float((torch.expm1(logs) - logs).mean()), rel=1e-4)
    ratios = logs.exp()
    assert entry["train/ratio_min"] == pytest.approx(float(ratios.min()))
    assert entry["train/ratio_max"] == pytest.approx(float(ratios.max()))
    assert float(ratios.max() - ratios.min()) > 1e-4
    assert 0 < entry["train/ratio_ess"] <= 1 + 1e-6


def test_an_algorithm_without_ratios_logs_none(model):
    (entry,) = learn(make(model, RWR), 1)
    assert "train/effective_sample_size" in entry
    assert [name for name in entry if "ratio_" in name] == []


def test_seconds_are_where_they_were_spent_and_sum_to_less_than_the_whole(model):
    def slow(images, prompts, metadata):
        time.sleep(0.05)
        return model.positions(images)[:, 0]

    learner = make(model, reward=slow, samples=16)
    began = time.monotonic()
    entries = learn(learner, 2)
    whole = time.monotonic() - began
    parts = [[entry[f"time/{part}_seconds"] for part in ("rollout", "reward", "train")] for entry in entries]
    assert all(second > 0 for row in parts for second in row)
    assert all(0.1 <= reward < 0.15 + rollout + train for rollout, reward, train in parts)
    assert sum(map(sum, parts)) <= whole


@pytest.mark.parametrize("axis", ["timesteps", "reward_queries"])
def test_the_x_axis_is_steps_or_reward_queries(model, axis):
    entries = learn(make(model, log=Log(x_axis=axis)), 2)
    assert [entry["step"] for entry in entries] == ([24, 48] if axis == "timesteps" else [8, 16])
    assert [entry["time/total_timesteps"] for entry in entries] == [24, 48]
    assert [entry["time/reward_queries"] for entry in entries] == [8, 16]


def test_the_x_axis_is_saved_and_checked(model, tmp_path):
    learner = make(model, log=Log(x_axis="reward_queries"))
    learner.save(tmp_path / "run")
    assert DDPOIS.load(tmp_path / "run", learner.env).log == Log(x_axis="reward_queries")
    with pytest.raises(ValueError, match=r"x_axis must be one of \('timesteps', 'reward_queries'\), got 'wall'"):
        Log(x_axis="wall")


def test_nothing_is_logged_with_interval_0(model, monkeypatch):
    monkeypatch.setattr(reports, "read_numbers", lambda tensors: pytest.fail("read from the device"))
    learner = make(model)
    assert learn(learner, 2, log_interval=0) == []
    assert dict(learner.logger.name_to_value) == {}


def test_what_interval_skips_is_not_logged(model):
    entries = learn(make(model), 4, log_interval=2)
    assert [entry["time/iterations"] for entry in entries] == [2, 4]


def test_no_picture_is_drawn_for_a_log_of_text(model, monkeypatch, capsys):
    monkeypatch.setattr(reports, "captioned_grid", lambda *_: pytest.fail("drawn"))
    make(model, verbose=1).learn(24)
    assert "ep_rew_q05" in capsys.readouterr().out


def test_hyperparameters_are_the_runs(model):
    learner = make(model, clip_range=1e-3, optimizer=AdamW(max_grad_norm=None, weight_decay=0.25))
    found = learn(learner, 2)[0]["hyperparameters"]
    assert isinstance(found, HParam)
    assert set(found.metric_dict) == {"rollout/ep_rew_mean"}
    assert set(learner.hyperparameters()) <= set(found.hparam_dict)
    expected = {
        "algorithm": "DDPOIS",
        "learning_rate": 1e-3,
        "seed": 5,
        "clip_range": 1e-3,
        "batch_size": 8,
        "samples": 8,
        "optimizer": "AdamW",
        "optimizer/weight_decay": 0.25,
        "optimizer/max_grad_norm": "None",
        "optimizer/eight_bit": "False",
        "advantages": "PerPrompt",
        "advantages/center": "False",
        "rollouts": "Rollouts",
        "rollouts/group_size": 1,
        "steps/window": "None",
        "kl": "None",
        "log/x_axis": "timesteps",
        "policy": "DenoisingPolicy",
        "policy/sampler": "DDIM",
        "policy/sampler/eta": 1.0,
        "policy/adaptation": "Full",
        "policy/precision": "None",
        "env/num_envs": 8,
        "env/num_steps": 3,
        "env/reward": "<lambda>",
    }
    assert {name: found.hparam_dict[name] for name in expected} == expected


PARTS_IN_PARTS = [
    (
        DDPOIS,
        {
            "optimizer": Muon(weight_decay=0.5),
            "kl": KL(0.1, target=0.5),
            "steps": Steps(fraction=0.5, window=Window(2, within=(0, 3))),
            "advantages": PerPrompt(8, 2),
        },
        {
            "optimizer": "Muon",
            "optimizer/weight_decay": 0.5,
            "optimizer/betas": "[0.9, 0.999]",
            "kl": "KL",
            "kl/coefficient": 0.1,
            "kl/place": "loss",
            "kl/target": 0.5,
            "steps": "Steps",
            "steps/fraction": 0.5,
            "steps/window": "Window",
            "steps/window/size": 2,
            "steps/window/within": "[0, 3]",
            "advantages/buffer_size": 8,
        },
    ),
    (RLOO, {"advantages": Groups(scale="group")}, {"advantages": "Groups", "advantages/scale": "group", "group": 4}),
    (
        RWR,
        {"noising": Noising(draws=2)},
        {"weights": "Softmax", "weights/normalise": "True", "noising/draws": 2, "noising/guidance_scale": "None"},
    ),
]


@pytest.mark.filterwarnings("ignore:the ratio of a whole trajectory of latents")
@pytest.mark.parametrize(("algorithm", "parts", "expected"), PARTS_IN_PARTS)
def test_parts_are_shown_flattened_among_the_hyperparameters(model, algorithm, parts, expected):
    found = learn(make(model, algorithm, **parts), 1)[0]["hyperparameters"].hparam_dict
    assert {name: found.get(name) for name in expected} == expected
    assert all(isinstance(value, str | int | float) for value in found.values())
    assert "kl/reference" not in found  # which is not written down


def test_a_scheduled_learning_rate_and_a_seed_beyond_floats_are_hyperparameters_as_text(model):
    learner = make(model, learning_rate=lambda remaining: 2e-4 * remaining, seed=2**60 + 1)
    found = learn(learner, 1)[0]["hyperparameters"].hparam_dict
    assert (found["learning_rate"], found["seed"]) == ("0.0002, scheduled", str(2**60 + 1))


def test_a_run_on_times_is_logged_too(tmp_path, emoji):
    """Actions are no latents there, and the images' rewards are not the returns."""
    env = gym.make_vec(
        "TimePredictionMDP-v0",
        num_envs=4,
        model=emoji,
        reward="brightness",
        max_steps=3,
        step_cost="linear",
        step_cost_weight=0.5,
        autoreset_mode="DISABLED",
    )
    learner = RLOO(ContextFreeSchedule([0.3, 0.3, 0.3]), env, tensorboard_log=str(tmp_path), seed=0)
    learner.learn(1, tb_log_name="run")
    events = EventAccumulator(str(tmp_path / "run_1"))
    events.Reload()
    tags = events.Tags()
    assert "rollout/latent_diversity" not in tags["scalars"]
    assert {"rollout/ep_rew_q50", "train/ratio_max", "time/reward_seconds"} <= set(tags["scalars"])
    assert tags["images"] == ["images/samples"]
    assert tags["histograms"] == ["rollout/ep_rew"]
    assert "rollout/prompts/text_summary" in tags["tensors"]
    assert hparams.SESSION_START_INFO_TAG in events.summary_metadata


def test_the_learning_rate_is_the_one_that_was_used(model):
    entries = learn(make(model, learning_rate=3e-4, optimizer=AdamW(warmup_updates=3)), 4)
    assert [entry["train/learning_rate"] for entry in entries] == pytest.approx([1e-4, 2e-4, 3e-4, 3e-4])
