"""The check of a diffusion model: that environments and policies can rely on what they ask of it."""

import copy
import pickle
import tempfile
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from .. import transfer
from ..models.base import Conditioning, DiffusionModel, Prediction
from ..predictions import PredictionType, broadcast_to
from ..prompts import make_prompts
from ..samplers import Sampler
from ..schedules import NoiseSchedule
from .isolation import called, generator_states, moved_generators, tensors_of, unlike_tensors
from .report import Findings, Report, fault

_BATCH = 3


def check_model(model: DiffusionModel, *, strict: bool = False) -> Report:
    """Check that a diffusion model keeps its contract, and report on what could not be checked.

    Its facts fit together; the schedule falls; the denoiser is frozen. Prompts, predictions, images and latents have
    the right shapes, dtypes, device and range, are the same again, do not depend on the rest of the batch, and neither
    change what they are given nor move the global generators. x_t = α_t·x̂_0 + σ_t·ε̂, with a time of its own for each
    sample; guidance does what the model says of it; another denoiser is asked where one is given, and can be trained.
    LoRA layers survive their file, and the model a pickle.

    It makes two copies of the denoiser.

    Args:
        model: The model.
        strict: Weaknesses, and what cannot be checked, are errors.

    Raises:
        AssertionError: the contract is broken; the message says where.
    """
    if not isinstance(model, DiffusionModel):
        raise fault(f"must be a DiffusionModel, got {type(model).__name__}", key="model")
    check = _Check(model)
    check.run()
    return check.findings.report(strict=strict)


class _Check:
    """One check of one model."""

    def __init__(self, model: DiffusionModel) -> None:
        self.model = model
        self.findings = Findings(f"{type(model).__name__} {model.source!r} on {model.device}, {model.dtype}")
        self.tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 5e-2

    def run(self) -> None:
        """Make all checks."""
        states = moved_generators()
        with self.findings.checking("facts"):
            self._check_facts()
        with self.findings.checking("schedule"):
            self._check_schedule()
        with self.findings.checking("frozen denoiser"):
            self._check_denoiser()
        with self.findings.checking("prompts"):
            conditioning = self._check_prompts()
        with self.findings.checking("predictions"), torch.no_grad():
            latents, t = self._noisy_latents()
            prediction = self._check_predictions(latents, t, conditioning)
        with self.findings.checking("features"), torch.no_grad():
            self._check_features(latents, t, conditioning, prediction)
        with self.findings.checking(f"guidance ({self.model.guidance})"), torch.no_grad():
            self._check_guidance(latents, t, conditioning)
        with self.findings.checking("another denoiser"):
            self._check_other_denoiser(latents, t, conditioning, prediction)
        with self.findings.checking("images"), torch.no_grad():
            self._check_images()
        with self.findings.checking("LoRA files"):
            self._check_lora()
        with self.findings.checking("copies and pickles"):
            self._check_copies(latents, t, conditioning, prediction)
        with self.findings.checking("the global generators are left alone"):
            if generator_states() != states:
                raise fault("draws from or seeds a global generator of torch, NumPy or Python", key="model")

    def _check_facts(self) -> None:
        model = self.model
        for name in ("latent_shape", "image_shape", "feature_shape"):
            shape = getattr(model, name, None)
            if not isinstance(shape, tuple) or len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape):
                raise fault(f"must be three numbers above 0, got {shape!r}", key=name)
        if model.image_shape[0] != 3:
            raise fault(f"must begin with 3 for RGB, got {model.image_shape}", key="image_shape")
        if max(model.feature_shape[1:]) > 16:
            raise fault(f"must be at most 16 high and wide, got {model.feature_shape}", key="feature_shape")
        for name, kind in (("schedule", NoiseSchedule), ("default_sampler", Sampler), ("path", Path)):
            if not isinstance(getattr(model, name, None), kind):
                raise fault(f"must be a {kind.__name__}, got {getattr(model, name, None)!r:.80}", key=name)
        if model.prediction_type not in get_args(PredictionType):
            raise fault(
                f"must be one of {get_args(PredictionType)}, got {model.prediction_type!r}", key="prediction_type"
            )
        if model.guidance not in ("classifier_free", "embedded", "none"):
            raise fault(f'must be "classifier_free", "embedded" or "none", got {model.guidance!r}', key="guidance")
        if not 0 <= model.default_guidance_scale < float("inf"):
            raise fault(
                f"must be finite and at least 0, got {model.default_guidance_scale}", key="default_guidance_scale"
            )
        if not (model.path / model.denoiser_folder).is_dir():
            raise fault(f"must be a folder in {model.path}, got {model.denoiser_folder!r}", key="denoiser_folder")

    def _check_schedule(self) -> None:
        schedule = self.model.schedule
        for num_steps in (1, 4):
            times = schedule.timesteps(num_steps)
            if times.shape != (num_steps + 1,) or not (times[1:] < times[:-1]).all():
                what = f"must be {num_steps + 1} falling times, got {times.tolist()}"
                raise fault(what, key=f"schedule.timesteps({num_steps})")
            alpha, sigma = schedule.alpha(times.double()), schedule.sigma(times.double())
            levels = sigma / alpha.clamp(min=1e-12)
            if not (torch.isfinite(alpha).all() and (levels[1:] < levels[:-1]).all() and (sigma >= 0).all()):
                raise fault(f"sigma/alpha must fall with t, got {levels.tolist()} at {times.tolist()}", key="schedule")

    def _check_denoiser(self) -> None:
        denoiser, model = self.model.denoiser, self.model
        if any(module.training for module in denoiser.modules()):
            raise fault("must be in eval mode", key="denoiser")
        for name, parameter in denoiser.named_parameters():
            if parameter.requires_grad:
                raise fault("must be frozen, but requires a gradient", key=f"denoiser.{name}")
            if not transfer.is_same_device(parameter.device, model.device) or parameter.dtype != model.dtype:
                what = f"must be {model.dtype} on {model.device}, got {parameter.dtype} on {parameter.device}"
                raise fault(what, key=f"denoiser.{name}")
        names = [name for name, _ in denoiser.named_modules()]
        for target in model.lora_targets:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise fault(f"no layer of the denoiser is named {target!r}", key="lora_targets")

    def _check_prompts(self) -> Conditioning:
        model, texts = self.model, list(make_prompts(self.model.default_prompts).texts[:_BATCH])
        texts = (texts * _BATCH)[:_BATCH]
        conditioning = called("encode_prompts", model.encode_prompts, prompts=texts)
        for key, value in conditioning.items():
            self._check_tensor(value, _BATCH, None, f"encode_prompts(…)[{key!r}]", exact=True)
        positive = {key: value for key, value in conditioning.items() if not key.startswith("negative_")}
        for key, value in positive.items():
            negative = conditioning.get(f"negative_{key}")
            if (negative is not None) != (model.guidance == "classifier_free"):
                what = (
                    f"guidance is {model.guidance!r}, so it must {'have' if negative is None else 'not have'} negatives"
                )
                raise fault(what, key=f"encode_prompts(…)[{key!r}]")
            if negative is not None and negative.shape != value.shape:
                raise fault(f"has shape {list(negative.shape)}, expected {list(value.shape)}", key=f"negative_{key}")
        for key, value in model._encode(texts[:1]).items():
            found = unlike_tensors(value, conditioning[key][:1], self.tolerance)
            if found:
                raise fault(f"a prompt alone must be encoded as among others: {found}", key=key)
        if len(set(texts)) > 1 and all(torch.equal(value[0], value[1]) for value in positive.values()):
            raise fault(f"{texts[0]!r} and {texts[1]!r} are encoded alike", key="encode_prompts")
        if any(len(value) for value in model.encode_prompts([]).values()):
            raise fault("no prompts must give no rows", key="encode_prompts([])")
        return conditioning

    def _noisy_latents(self) -> tuple[Tensor, Tensor]:
        """Return x_t [3, C, H, W] at three times, [3]."""
        generator = torch.Generator().manual_seed(0)
        clean, noise = torch.randn(2, _BATCH, *self.model.latent_shape, generator=generator).to(self.model.device)
        t = self.model.schedule.timesteps(_BATCH)[:-1].float().to(self.model.device)
        alpha, sigma = self.model.schedule.alpha(t), self.model.schedule.sigma(t)
        return (broadcast_to(alpha, clean) * clean + broadcast_to(sigma, clean) * noise).float(), t

    def _denoise(
        self,
        latents: Tensor,
        t: Tensor,
        conditioning: Conditioning,
        *,
        scale: float = 1.0,
        network: nn.Module | None = None,
    ) -> Prediction:
        return self.model.denoise(latents, t, conditioning, guidance_scale=scale, denoiser=network)

    def _check_predictions(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        prediction = called("denoise", self._denoise, latents=latents, t=t, conditioning=dict(conditioning))
        for name in ("x0", "epsilon"):
            self._check_tensor(getattr(prediction, name), _BATCH, self.model.latent_shape, f"denoise(…).{name}")
        alpha, sigma = self.model.schedule.alpha(t), self.model.schedule.sigma(t)
        noisy = broadcast_to(alpha, latents) * prediction.x0 + broadcast_to(sigma, latents) * prediction.epsilon
        self._require(noisy, latents, 1e-3, "x_t must be α_t·x̂_0 + σ_t·ε̂", "denoise")
        self._require_prediction(self._denoise(latents, t, conditioning), prediction, 0.0, "the same inputs")
        for row in range(_BATCH):
            one = {key: value[row : row + 1] for key, value in conditioning.items()}
            alone = self._denoise(latents[row : row + 1], t[row : row + 1], one)
            wanted = Prediction(prediction.x0[row : row + 1], prediction.epsilon[row : row + 1])
            what = f"sample {row} at its time alone, and in a batch,"
            self._require_prediction(alone, wanted, self.tolerance, what)
        same = latents[:1].expand_as(latents)
        rolled = {key: value.roll(1, 0) for key, value in conditioning.items()}
        times = t[:1].expand_as(t)
        if not unlike_tensors(self._denoise(same, times, conditioning).x0, self._denoise(same, times, rolled).x0, 0.0):
            raise fault("does not depend on the prompt", key="denoise(…).x0")
        if not unlike_tensors(self._raw(latents, t, conditioning), self._raw(latents, t.roll(1), conditioning), 0.0):
            raise fault("does not depend on the time", key="_model_output")
        return prediction

    def _raw(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        inputs = {key: value for key, value in conditioning.items() if not key.startswith("negative_")}
        return self.model._model_output(self.model.denoiser, latents, t, inputs, 1.0)

    def _check_features(self, latents: Tensor, t: Tensor, conditioning: Conditioning, expected: Prediction) -> None:
        model = self.model
        prediction = model.denoise(latents, t, conditioning, guidance_scale=1.0, with_features=True)
        if prediction.features is None or prediction.time_embedding is None:
            raise fault("must be there where with_features=True", key="denoise(…).features")
        self._check_tensor(prediction.features, _BATCH, model.feature_shape, "denoise(…).features")
        embedding = prediction.time_embedding
        self._check_tensor(embedding, _BATCH, (model.time_embedding_size,), "denoise(…).time_embedding")
        self._require_prediction(prediction, expected, self.tolerance, "a prediction with features and one without")

    def _check_guidance(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> None:
        own, half, two, three = (self._denoise(latents, t, conditioning, scale=scale) for scale in (1.0, 0.5, 2.0, 3.0))
        if self.model.guidance == "classifier_free":
            self._require_prediction(half, own, 0.0, "guidance_scale 0.5 and 1, which are both none,")
            line = 2 * two.epsilon - own.epsilon
            what = "ε̂ must be linear in guidance_scale: output(negative) + w·(output(prompt) − output(negative))"
            self._require(three.epsilon, line, 2 * self.tolerance, what, "denoise")
        elif self.model.guidance == "embedded" and not unlike_tensors(two.x0, three.x0, 0.0):
            raise fault("guidance is embedded, but the scales 2 and 3 predict the same", key="denoise")
        elif self.model.guidance == "none":
            self._require_prediction(three, own, 0.0, "guidance is none: the scales 3 and 1")

    def _check_other_denoiser(
        self, latents: Tensor, t: Tensor, conditioning: Conditioning, expected: Prediction
    ) -> None:
        network = copy.deepcopy(self.model.denoiser).requires_grad_()
        with torch.no_grad():
            copied = self._denoise(latents, t, conditioning, network=network)
            self._require_prediction(copied, expected, self.tolerance, "a copy of the frozen denoiser and itself")
        trained = self._denoise(latents, t, conditioning, network=network).x0.square().mean()
        if trained.requires_grad:
            trained.backward()
        if not any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in network.parameters()):
            raise fault("no gradient reaches the parameters of another denoiser", key="denoise(denoiser=…)")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in network.parameters():
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(noise * (0.1 + parameter.abs().mean()))
            changed = self._denoise(latents, t, conditioning, network=network)
            if not unlike_tensors(changed.x0, expected.x0, 0.0):
                raise fault("another denoiser is not asked: other weights predict the same", key="denoise(denoiser=…)")
            again = self._denoise(latents, t, conditioning)
            self._require_prediction(again, expected, 0.0, "the frozen denoiser before and after another was asked")

    def _check_images(self) -> None:
        model, generator = self.model, torch.Generator().manual_seed(1)
        latents = torch.randn(_BATCH, *model.latent_shape, generator=generator).to(model.device)
        images = called("decode", model.decode, latents=latents)
        self._check_pictures(images, "decode")
        self._require(model.decode(latents), images, 0.0, "the same latents must give the same images", "decode")
        alone = model.decode(latents[:1])
        self._require(
            alone, images[:1], self.tolerance, "latents alone must give the same image as in a batch", "decode"
        )
        self._check_pictures(model.decode(1000 * latents), "decode(1000·latents)")
        encoded = called("encode", model.encode, images=images)
        self._check_tensor(encoded, _BATCH, model.latent_shape, "encode", at_least_float32=False)
        self._require(model.encode(images), encoded, 0.0, "the same images must give the same latents", "encode")

    def _check_pictures(self, images: Tensor, name: str) -> None:
        self._check_tensor(images, _BATCH, self.model.image_shape, name, exact=True)
        low, high = (float(transfer.to_host(bound)) for bound in images.aminmax())
        if low < 0 or high > 1:
            raise fault(f"must be in [0, 1], got from {low:.3g} to {high:.3g}", key=name)

    def _check_lora(self) -> None:
        from diffusers.loaders import PeftAdapterMixin
        from peft import LoraConfig

        networks = [copy.deepcopy(self.model.denoiser) for _ in range(2)]
        for seed, network in enumerate(networks):
            if not isinstance(network, PeftAdapterMixin):
                return self.findings.cannot("LoRA files", "the denoiser takes no adapters: it is no PeftAdapterMixin")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                network.add_adapter(
                    LoraConfig(r=2, target_modules=list(self.model.lora_targets), init_lora_weights=False)
                )
        source, target = ({name: p for name, p in net.named_parameters() if "lora_" in name} for net in networks)
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_lora(networks[0], Path(folder))
            self.model.load_lora(networks[1], Path(folder))
        for name, parameter in source.items():
            found = unlike_tensors(target[name], parameter, self.tolerance)
            if found:
                raise fault(f"is not what save_lora was given: {found}", key=f"load_lora: {name}")
        return None

    def _check_copies(self, latents: Tensor, t: Tensor, conditioning: Conditioning, expected: Prediction) -> None:
        if copy.deepcopy(self.model) is not self.model:
            raise fault("a deep copy must be the model itself: it is shared", key="copy.deepcopy(model)")
        try:
            again = pickle.loads(pickle.dumps(self.model))
        except Exception as error:
            what = f"a pickle raises {type(error).__name__} ({error!s:.160})"
            return self.findings.weakness("copies and pickles", what)
        if type(again) is not type(self.model):
            what = f"a pickle comes back as {type(again).__name__}: its family is not in the table of models/base.py"
            return self.findings.weakness("copies and pickles", what)
        with torch.no_grad():
            prediction = again.denoise(latents, t, conditioning, guidance_scale=1.0)
        self._require_prediction(prediction, expected, self.tolerance, "the model and its pickle")
        return None

    def _check_tensor(
        self,
        value: object,
        batch: int,
        shape: tuple[int, ...] | None,
        name: str,
        *,
        exact: bool = False,
        at_least_float32: bool = True,
    ) -> None:
        """Check shape, dtype (float32; or float64 where not exact), device, that it is finite and has no graph."""
        if not isinstance(value, Tensor):
            raise fault(f"must be a tensor, got {type(value).__name__}", key=name)
        wanted = (batch, *(value.shape[1:] if shape is None else shape))
        if tuple(value.shape) != wanted:
            raise fault(f"has shape {list(value.shape)}, expected {list(wanted)}", key=name)
        allowed = (torch.float32,) if exact else (torch.float32, torch.float64)
        if value.dtype not in allowed and (at_least_float32 or not value.is_floating_point()):
            raise fault(f"must be float32, got {value.dtype}", key=name)
        if not transfer.is_same_device(value.device, self.model.device):
            raise fault(f"must be on {self.model.device}, got {value.device}", key=name)
        if value.requires_grad:
            raise fault("carries a gradient", key=name)
        if not transfer.to_host(torch.isfinite(value).all()):
            raise fault("must be finite", key=name)

    def _require(self, got: Tensor, expected: Tensor, tolerance: float, what: str, name: str) -> None:
        found = unlike_tensors(got, expected, tolerance)
        if found:
            raise fault(f"{what}: {found}", key=name)

    def _require_prediction(self, got: Prediction, expected: Prediction, tolerance: float, what: str) -> None:
        tensors = tensors_of({"x0": got.x0, "epsilon": got.epsilon})
        for name, value in tensors.items():
            found = unlike_tensors(value, getattr(expected, name), tolerance)
            if found:
                raise fault(f"{what} must agree: {found}", key=f"denoise(…).{name}")
