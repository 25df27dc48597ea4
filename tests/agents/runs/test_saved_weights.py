"""A saved policy's weights are loaded, all of them, or the loading says by name what is not there."""

import gymnasium as gym
import pytest
import torch
from safetensors.torch import load_file, save_file

import diffusion_gym  # noqa: F401
from agents import ContextFreeSchedule, DenoisingPolicy, FixedSchedule, Full, LoRA, TimePredictor
from diffusion_gym.models import load_model
from tests.agents.policies_of_others import WithCritic
from tests.tiny import make_tiny_stable_diffusion


def half(tensors):
    return dict(list(tensors.items())[: len(tensors) // 2])


def nan(tensors):
    return {name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}


# every policy's weights
def make_policies(mixture):
    env = gym.make_vec("TimePredictionMDP-v0", num_envs=2, model=mixture, reward="brightness", prompts=["north"])
    return {
        "denoiser/diffusion_pytorch_model": DenoisingPolicy(mixture),
        "schedule": ContextFreeSchedule([0.5, 0.4]),
        "time_predictor": TimePredictor(env.single_observation_space, seed=0),
    }


@pytest.mark.parametrize("name", ["denoiser/diffusion_pytorch_model", "schedule", "time_predictor"])
@pytest.mark.parametrize(("damage", "message"), [(half, "are missing"), (nan, "are NaN or infinite")])
def test_weights_that_are_not_whole_are_refused_by_name(tmp_path, mixture, name, damage, message):
    policy = make_policies(mixture)[name]
    policy.save(tmp_path)
    file = tmp_path / f"{name}.safetensors"
    save_file(damage(load_file(file)), file)
    with pytest.raises(ValueError, match=rf"holds no weights for .*{message} \("):
        type(policy).load(tmp_path, mixture)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{file} is damaged or not whole"):
        policy.load_weights(tmp_path)


def test_weights_of_another_shape_are_refused_by_name(tmp_path):
    ContextFreeSchedule([0.5, 0.4]).save(tmp_path / "free")
    FixedSchedule([0.5, 0.4]).save(tmp_path / "fixed")
    with pytest.raises(ValueError, match=r"logits \[2, 2\] instead of \[3, 2\]"):
        ContextFreeSchedule([0.5, 0.4, 0.3]).load_weights(tmp_path / "free")
    with pytest.raises(ValueError, match="has 2 ratios, this schedule 1"):
        FixedSchedule([0.5]).load_weights(tmp_path / "fixed")


@pytest.mark.parametrize(
    ("text", "message"), [("{", "policy.json is damaged"), ("{}", "policy.json does not say which")]
)
def test_a_damaged_description_of_a_policy_is_named(tmp_path, text, message):
    (tmp_path / "policy.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        FixedSchedule.load(tmp_path)


@pytest.mark.parametrize("adaptation", [LoRA(), Full()])
def test_another_model_of_the_same_shape_is_said(tmp_path, adaptation):
    first, second = (load_model(make_tiny_stable_diffusion(tmp_path / name)) for name in ("first", "second"))
    with torch.no_grad():
        for parameter in second.denoiser.parameters():
            parameter.mul_(1.05)
    DenoisingPolicy(first, adaptation=adaptation).save(tmp_path / "policy")
    with pytest.warns(UserWarning, match="trained on a model .*first.* whose denoiser has other weights than .*second"):
        DenoisingPolicy.load(tmp_path / "policy", second)
    DenoisingPolicy.load(tmp_path / "policy", load_model(first.path, dtype="bfloat16"))  # warnings are errors
    DenoisingPolicy.load(tmp_path / "policy", load_model(first.path, dtype="float16"))


# what subclasses add
class Forgetful(DenoisingPolicy):
    def __init__(self, model, *, temperature=1.0, **options):
        super().__init__(model, **options)


@pytest.mark.parametrize("adaptation", [LoRA(), Full()])
def test_a_policys_further_networks_and_arguments_are_saved_too(tmp_path, mixture, adaptation):
    policy = WithCritic(mixture, width=7, adaptation=adaptation)
    policy.save(tmp_path)
    again = WithCritic.load(tmp_path, mixture)
    assert again.width == 7
    assert torch.equal(again.critic.weight, policy.critic.weight)
    (tmp_path / "further_weights.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"further_weights.* holds no weights for WithCritic: of 2 weights 2 are missing"
    ):
        policy.load_weights(tmp_path)


def test_a_policys_arguments_that_would_be_lost_are_refused(tmp_path, mixture):
    with pytest.raises(TypeError, match=r"Forgetful would be loaded without its own arguments \['temperature'\]"):
        Forgetful(mixture, temperature=2.0).save(tmp_path)


def test_weights_of_another_models_denoiser_are_refused(tmp_path, emoji):
    tiny = load_model(make_tiny_stable_diffusion(tmp_path / "tiny"))
    DenoisingPolicy(tiny).save(tmp_path / "policy")
    with pytest.raises(
        ValueError, match=r"holds no weights for a policy of the model 'emoji': .* from one of '.*tiny'"
    ):
        DenoisingPolicy.load(tmp_path / "policy", emoji)


def test_policies_of_another_class_are_named(tmp_path):
    class Mine(DenoisingPolicy):
        pass

    policy = DenoisingPolicy(load_model("mixture"))
    policy.save(tmp_path / "policy")
    for kind in (TimePredictor, ContextFreeSchedule, FixedSchedule):
        with pytest.raises(ValueError, match=rf"policy holds a DenoisingPolicy, not a {kind.__name__}"):
            kind.load(tmp_path / "policy")
    FixedSchedule([0.5]).save(tmp_path / "schedule")
    with pytest.raises(ValueError, match="holds a FixedSchedule, not a DenoisingPolicy"):
        policy.load_weights(tmp_path / "schedule")
    assert isinstance(Mine.load(tmp_path / "policy", policy.model), Mine)
