"""`check_model` lets this package's models pass, and refuses those that break the contract, each in one way."""

import copy
from dataclasses import replace

import pytest
import torch

from diffusion_gym.models import load_model
from diffusion_gym.models.mixture import MixtureModel
from diffusion_gym.testing import check_model
from tests.families import FAMILIES


def made(kind, **facts):
    """Return the packaged mixture as an object of this class, with other facts."""
    model = kind.__new__(kind)
    vars(model).update(vars(load_model("mixture")) | facts)
    return model


class PredictsHalf(MixtureModel):
    def denoise(self, *args, **options):
        prediction = super().denoise(*args, **options)
        return replace(prediction, x0=prediction.x0.half())


class PredictsNoiseElsewhere(MixtureModel):
    def denoise(self, *args, **options):
        prediction = super().denoise(*args, **options)
        return replace(prediction, epsilon=2 * prediction.epsilon)


class AddsNoise(MixtureModel):
    noise = torch.Generator().manual_seed(0)

    def _model_output(self, network, latents, t, conditioning, guidance_scale):
        output = super()._model_output(network, latents, t, conditioning, guidance_scale)
        return output + torch.randn(output.shape, generator=self.noise)


class DrawsFromTheGlobalGenerator(MixtureModel):
    def encode(self, images):
        torch.rand(1)
        return super().encode(images)


class UsesTheFirstTime(MixtureModel):
    def _model_output(self, network, latents, t, conditioning, guidance_scale):
        return super()._model_output(network, latents, t[:1].expand_as(t), conditioning, guidance_scale)


class IgnoresTheTime(MixtureModel):
    def _model_output(self, network, latents, t, conditioning, guidance_scale):
        return super()._model_output(network, latents, torch.full_like(t, 500.0), conditioning, guidance_scale)


class IgnoresThePrompt(MixtureModel):
    def _model_output(self, network, latents, t, conditioning, guidance_scale):
        everything = {key: torch.ones_like(value) for key, value in conditioning.items()}
        return super()._model_output(network, latents, t, everything, guidance_scale)


class NormalisesTheBatch(MixtureModel):
    def _model_output(self, network, latents, t, conditioning, guidance_scale):
        output = super()._model_output(network, latents, t, conditioning, guidance_scale)
        return output - output.mean(0)


class ChangesTheLatents(MixtureModel):
    def denoise(self, latents, *args, **options):
        prediction = super().denoise(latents, *args, **options)
        latents += 1
        return prediction


class ReturnsTheLatents(MixtureModel):
    def denoise(self, latents, *args, **options):
        super().denoise(latents, *args, **options)
        return replace(super().denoise(latents, *args, **options), x0=latents)


class IsAlwaysFrozen(MixtureModel):
    def denoise(self, latents, t, conditioning, *, denoiser=None, **options):
        return super().denoise(latents, t, conditioning, **options)


class CutsTheGradient(MixtureModel):
    @torch.no_grad()
    def denoise(self, *args, **options):
        return super().denoise(*args, **options)


class GuidesAtHalf(MixtureModel):
    def denoise(self, latents, t, conditioning, *, guidance_scale, **options):
        prediction = super().denoise(latents, t, conditioning, guidance_scale=guidance_scale, **options)
        return prediction if guidance_scale >= 1 else replace(prediction, x0=prediction.x0 + 1)


class GuidesOutOfLine(MixtureModel):
    def denoise(self, latents, t, conditioning, *, guidance_scale, **options):
        return super().denoise(latents, t, conditioning, guidance_scale=max(guidance_scale, 1) ** 2, **options)


class ForgetsTheFeatures(MixtureModel):
    def denoise(self, *args, **options):
        return replace(super().denoise(*args, **options), features=None)


class PredictsOtherwiseWithFeatures(MixtureModel):
    def denoise(self, *args, with_features=False, **options):
        prediction = super().denoise(*args, with_features=with_features, **options)
        if not with_features:
            return prediction
        return replace(prediction, x0=prediction.x0 + 1)


class EncodesAlike(MixtureModel):
    def _encode(self, prompts):
        return {key: torch.ones_like(value) for key, value in super()._encode(prompts).items()}


class EncodesByTheBatch(MixtureModel):
    def _encode(self, prompts):
        return {key: value * len(prompts) for key, value in super()._encode(prompts).items()}


class HasNoNegatives(MixtureModel):
    def encode_prompts(self, prompts, negative_prompt=""):
        conditioning = super().encode_prompts(prompts, negative_prompt)
        return {key: value for key, value in conditioning.items() if not key.startswith("negative")}


class DecodesBeyondOne(MixtureModel):
    def _decode(self, latents):
        return 1.5 * super()._decode(latents)


class DecodesToNaN(MixtureModel):
    def _decode(self, latents):
        return super()._decode(latents) * torch.nan


class DecodesToHalf(MixtureModel):
    def decode(self, latents):
        return super().decode(latents).half()


class DecodesAnotherShape(MixtureModel):
    def _decode(self, latents):
        return super()._decode(latents).flatten(2)


class StretchesTheContrast(MixtureModel):
    def _decode(self, latents):
        images = super()._decode(latents)
        return (images - images.min()) / (images.max() - images.min()).clamp(min=1e-6)


class EncodesToAnotherShape(MixtureModel):
    def encode(self, images):
        return super().encode(images).flatten(1)


class LosesTheLoRA(MixtureModel):
    def load_lora(self, denoiser, folder):
        pass


class CopiesItself(MixtureModel):
    def __deepcopy__(self, memo):
        return copy.copy(object.__new__(type(self)))


BROKEN = {
    PredictsHalf: r"denoise\(…\).x0: must be float32, got torch.float16",
    PredictsNoiseElsewhere: "denoise: x_t must be α_t·x̂_0 \\+ σ_t·ε̂: they differ by",
    AddsNoise: r"denoise\(…\).x0: the same inputs must agree: they differ by",
    DrawsFromTheGlobalGenerator: "model: draws from or seeds a global generator",
    UsesTheFirstTime: r"sample 1 at its time alone, and in a batch, must agree: they differ by",
    IgnoresTheTime: "_model_output: does not depend on the time",
    IgnoresThePrompt: r"denoise\(…\).x0: does not depend on the prompt",
    NormalisesTheBatch: "sample 0 at its time alone, and in a batch, must agree",
    ChangesTheLatents: r"denoise\(latents=…\): must not change its argument",
    ReturnsTheLatents: "denoise: what it returns.x0 shares memory with latents: return a copy",
    IsAlwaysFrozen: "no gradient reaches the parameters of another denoiser",
    CutsTheGradient: "no gradient reaches the parameters of another denoiser",
    GuidesAtHalf: r"guidance_scale 0.5 and 1, which are both none, must agree",
    GuidesOutOfLine: "ε̂ must be linear in guidance_scale",
    ForgetsTheFeatures: r"denoise\(…\).features: must be there where with_features=True",
    PredictsOtherwiseWithFeatures: "a prediction with features and one without must agree",
    EncodesAlike: "encode_prompts: 'anything' and 'east' are encoded alike",
    EncodesByTheBatch: "prompt_embeds: a prompt alone must be encoded as among others",
    HasNoNegatives: r"\['prompt_embeds'\]: guidance is 'classifier_free', so it must have negatives",
    DecodesBeyondOne: r"decode.*: must be in \[0, 1\], got from .* to 1.",
    DecodesToNaN: "decode.*: must be finite",
    DecodesToHalf: "decode: must be float32, got torch.float16",
    DecodesAnotherShape: r"decode: has shape \[3, 3, 1\], expected \[3, 3, 1, 1\]",
    StretchesTheContrast: "latents alone must give the same image as in a batch",
    EncodesToAnotherShape: r"encode: has shape \[3, 2\], expected \[3, 2, 1, 1\]",
    LosesTheLoRA: "load_lora: .*lora_.*: is not what save_lora was given",
    CopiesItself: r"copy.deepcopy\(model\): a deep copy must be the model itself",
}


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_broken_models_are_refused(kind):
    with pytest.raises(AssertionError, match=BROKEN[kind]):
        check_model(made(kind))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"latent_shape": [2, 1, 1]}, r"latent_shape: must be three numbers above 0, got \[2, 1, 1\]"),
        ({"image_shape": (1, 1, 1)}, "image_shape: must begin with 3 for RGB"),
        ({"feature_shape": (128, 32, 32)}, "feature_shape: must be at most 16 high and wide"),
        ({"feature_shape": (64, 1, 1)}, r"denoise\(…\).features: has shape \[3, 128, 1, 1\], expected \[3, 64, 1, 1\]"),
        ({"time_embedding_size": 8}, r"time_embedding: has shape \[3, 16\], expected \[3, 8\]"),
        ({"prediction_type": "noise"}, "prediction_type: must be one of .*, got 'noise'"),
        ({"guidance": "some"}, 'guidance: must be "classifier_free", "embedded" or "none", got \'some\''),
        ({"guidance": "embedded"}, "guidance is embedded, but the scales 2 and 3 predict the same"),
        ({"default_guidance_scale": float("nan")}, "default_guidance_scale: must be finite and at least 0, got nan"),
        ({"denoiser_folder": "unet"}, "denoiser_folder: must be a folder in .*, got 'unet'"),
        ({"lora_targets": ("to_q",)}, "lora_targets: no layer of the denoiser is named 'to_q'"),
        ({"schedule": None}, "schedule: must be a NoiseSchedule, got None"),
    ],
)
def test_facts_that_do_not_fit_are_refused(facts, message):
    with pytest.raises(AssertionError, match=message):
        check_model(made(MixtureModel, **facts))


def test_a_denoiser_that_is_not_frozen_is_refused():
    for change, message in (
        (lambda network: network.train(), "denoiser: must be in eval mode"),
        (lambda network: network.double(), "denoiser.first.weight: must be torch.float32 on cpu, got torch.float64"),
        (lambda network: network.requires_grad_(), "denoiser.first.weight: must be frozen, but requires a gradient"),
    ):
        model = load_model("mixture")
        change(model.denoiser)
        with pytest.raises(AssertionError, match=message):
            check_model(model)


def test_a_family_that_is_not_in_the_table_has_a_weakness():
    class Mine(MixtureModel):
        pass

    report = check_model(made(Mine))
    assert report.unchecked == {}
    assert "a pickle comes back as MixtureModel" in report.weaknesses["copies and pickles"]


def test_something_else_is_refused():
    with pytest.raises(AssertionError, match="model: must be a DiffusionModel, got Linear"):
        check_model(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("name", ["mixture", "emoji", "emoji_flow"])
def test_the_embedded_models_pass(name):
    report = check_model(load_model(name), strict=True)
    assert str(report).splitlines()[0].endswith(f"Model '{name}' on cpu, torch.float32")
    assert len(report.holds) == 12


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_passes(family, tmp_path):
    model = load_model(family.write(tmp_path / "model"), image_size=family.told_size)
    check_model(model, strict=True)
