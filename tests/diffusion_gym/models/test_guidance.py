"""A family of models says how a prompt is given weight: by two passes, or by a scale that its network is told."""

import gymnasium as gym
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

import diffusion_gym  # noqa: F401
from agents import DenoisingPolicy
from diffusion_gym.models import load_model
from diffusion_gym.models.mixture import MixtureModel
from tests.tiny import make_tiny_stable_diffusion


class Embedded(MixtureModel):
    """A mixture whose network is told the scale, which its output and its features then are multiples of."""

    guidance = "embedded"

    def __init__(self):
        super().__init__(load_model("mixture").origin)
        self.default_guidance_scale = 3.0
        self.passes = []

    def _encode(self, prompts):
        self.encoded = list(prompts)
        return super()._encode(prompts)

    def _model_features(self, network, latents, t, conditioning, guidance_scale):
        self.passes.append((len(latents), sorted(conditioning), guidance_scale))
        output, features, embedding = super()._model_features(network, latents, t, conditioning, guidance_scale)
        return output * guidance_scale, features * guidance_scale, embedding


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_an_embedded_scale_goes_into_the_network_in_one_pass(scale):
    plain, embedded = load_model("mixture"), Embedded()
    latents, t = (
        torch.randn(2, *plain.latent_shape, generator=torch.Generator().manual_seed(0)),
        torch.full((2,), 500.0),
    )
    conditioning = embedded.encode_prompts(["north", "south"])
    assert set(conditioning) == {"prompt_embeds"}
    assert embedded.encoded == ["north", "south"]
    expected = plain.denoise(
        latents, t, plain.encode_prompts(["north", "south"]), guidance_scale=1.0, with_features=True
    )
    predictions = [
        embedded.denoise(latents, t, conditioning, guidance_scale=scale, with_features=features)
        for features in (False, True)
    ]
    assert embedded.passes == [(2, ["prompt_embeds"], scale)] * 2
    for prediction in predictions:
        torch.testing.assert_close(prediction.epsilon, scale * expected.epsilon)
    torch.testing.assert_close(predictions[1].features, scale * expected.features)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_classifier_free_guidance_doubles_the_batch_above_one(monkeypatch, scale):
    model, passes = load_model("mixture"), []
    output = model._model_output
    monkeypatch.setattr(
        model, "_model_output", lambda network, x, *rest: passes.append((len(x), rest[-1])) or output(network, x, *rest)
    )
    conditioning = model.encode_prompts(["north", "south"])
    model.denoise(torch.zeros(2, *model.latent_shape), torch.full((2,), 500.0), conditioning, guidance_scale=scale)
    assert passes == [(2 if scale == 1 else 4, scale)]


def test_a_negative_prompt_without_effect_is_named():
    with pytest.raises(
        ValueError, match="negative_prompt='south' has no effect: 'mixture' is not guided by a second pass"
    ):
        Embedded().encode_prompts(["north"], "south")
    with pytest.raises(ValueError, match="negative_prompt='south' has no effect"):
        gym.make_vec("DenoisingMDP-v0", model=Embedded(), negative_prompt="south")


@pytest.mark.parametrize(
    ("env_id", "length"), [("DenoisingMDP-v0", "num_steps"), ("TimePredictionMDP-v0", "max_steps")]
)
def test_environments_run_with_embedded_guidance_and_observe_no_negative(env_id, length):
    env = gym.make_vec(env_id, num_envs=2, model=Embedded(), reward="brightness", **{length: 1})
    observation, _ = env.reset(seed=0)
    assert "negative_prompt_embeds" not in observation
    actions = torch.full((2, *env.single_action_space.shape), 0.5)
    assert env.step(actions)[4]["ended"].all()


def test_an_embedded_model_with_no_prompts_says_of_what_shape_embeddings_are():
    assert Embedded().encode_prompts([])["prompt_embeds"].shape == (0, 1, 8)


def test_training_in_bf16_on_a_cpu_takes_plain_attention(tmp_path):
    model = load_model(make_tiny_stable_diffusion(tmp_path / "tiny"))
    for bf16, kind in ((False, AttnProcessor2_0), (True, AttnProcessor)):
        model.use_training_attention(model.denoiser, bf16=bf16)
        assert {type(processor) for processor in model.denoiser.attn_processors.values()} == {kind}
    mixture = load_model("mixture")
    mixture.use_training_attention(mixture.denoiser, bf16=True)


def test_a_scale_without_effect_is_named(monkeypatch):
    model = load_model("mixture")
    monkeypatch.setattr(model, "guidance", "none")
    assert model.guidance_scale_of(1.0) == 1.0
    assert model.guidance_scale_of(None) == model.default_guidance_scale
    for make in (
        lambda: DenoisingPolicy(model, guidance_scale=3.0),
        lambda: gym.make_vec("TimePredictionMDP-v0", model=model, guidance_scale=3.0),
    ):
        with pytest.raises(
            ValueError, match=r"guidance_scale=3\.0 has no effect: 'mixture' was distilled for one scale"
        ):
            make()
