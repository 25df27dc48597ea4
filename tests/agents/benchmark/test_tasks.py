"""The tasks are what a version of the protocol says."""

import json

import numpy as np
import pytest
import torch

from agents.benchmark.plane import plausibility, rightness
from agents.benchmark.tasks import TASKS, digest_of, find_task
from agents.policies import Policy
from diffusion_gym.models import load_model

PACKAGED = [name for name, task in TASKS.items() if task.model_sha256 is not None]


@pytest.mark.parametrize("name", PACKAGED)
def test_the_weights_are_those_of_the_protocol(name):
    """Where this fails the embedded weights have changed: that is another version of the protocol."""
    assert digest_of(load_model(TASKS[name].model)) == TASKS[name].model_sha256


@pytest.mark.parametrize("name", PACKAGED)
def test_a_task_has_an_environment_and_a_policy_for_it(name):
    task = TASKS[name]
    env = task.make_env()
    assert env.num_envs == task.num_envs
    policy = task.make_policy(env, 0)
    assert isinstance(policy, Policy)
    policy.check_fit(env.single_observation_space, env.single_action_space)
    json.dumps(task.described())


def test_tasks_are_found_by_name():
    assert find_task("emoji") is TASKS["emoji"]
    with pytest.raises(ValueError, match=r"[Dd]id you mean 'emoji'"):
        find_task("emojy")


def test_the_digest_is_of_names_and_contents_but_not_of_the_card(tmp_path):
    class Model:
        path = tmp_path

    (tmp_path / "a.json").write_text("1")
    first = digest_of(Model)
    (tmp_path / "README.md").write_text("a card")
    assert digest_of(Model) == first
    (tmp_path / "a.json").rename(tmp_path / "b.json")
    assert digest_of(Model) != first


def test_the_rewards_of_the_plane():
    model = load_model("mixture")
    x = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    images = torch.zeros(3, 3, 1, 1)
    images[:, :2, 0, 0] = 0.5 + x / (2 * model.extent)
    assert np.allclose(rightness(images, ["anything"] * 3, None), x[:, 0], atol=1e-5)
    east, north, middle = plausibility(images, ["east", "east", "anything"], None).tolist()
    assert east > 0 > middle >= north == -20
