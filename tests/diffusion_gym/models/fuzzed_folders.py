"""Model folders whose configurations are changed at random, and what becomes of each here and in diffusers.

    python -m tests.diffusion_gym.models.fuzzed_folders 0 1000        # or 0 1000 all, to see every one

counts the folders that load and equal diffusers' own pipeline, that are warned about and that are refused, and names
all others: there should be none. Each folder has a seed of its own, which draws it again.
"""

import copy
import json
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from diffusion_gym.models import load_model
from diffusion_gym.sampling import sample_latents
from tests.tiny import make_tiny_stable_diffusion

PROMPTS = ["a cat", "an ant on a pink background"]
GUIDANCE_SCALE = 4.0
TOLERANCE = 2e-3

# Some read by a scheduler of another class than DDIM's: the folder of each is what diffusers' `save_pretrained` writes.
SCHEDULERS = (
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
)
FILES = {
    "model_index.json": 3,
    "scheduler/scheduler_config.json": 8,
    "unet/config.json": 6,
    "vae/config.json": 4,
    "text_encoder/config.json": 4,
    "tokenizer/tokenizer_config.json": 3,
}
ANYTHING = (None, True, False, 0, 1, 2, -1, 0.5, 8.0, 1e30, "", "1", "nonsense", [], [1], [8, 8], [8, 16], {}, {"a": 1})
LIKELY = {
    "_class_name": ["LCMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DiffusionPipeline", ["a", "b"]],
    "_diffusers_version": ["0.8.1", "0.6.0", "0.9.0", "nonsense"],
    "timestep_spacing": ["leading", "trailing", "linspace"],
    "prediction_type": ["epsilon", "v_prediction", "sample", "flow", "flow_prediction"],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2", "exp"],
    "num_train_timesteps": [2, 10, 100, 1000],
    "steps_offset": [0, 1, 2],
    "set_alpha_to_one": [True, False],
    "rescale_betas_zero_snr": [True, False],
    "trained_betas": [[0.1, 0.2, 0.3], [0.01] * 1000],
    "final_sigmas_type": ["zero", "sigma_min"],
    "use_karras_sigmas": [True, False],
    "thresholding": [True, False],
    "sample_size": [8, 16, [8, 8], [8, 16], 7],
    "in_channels": [3, 4, 8, 9],
    "out_channels": [3, 4, 8],
    "latent_channels": [4, 8],
    "scaling_factor": [0.13, 1.0, 0],
    "shift_factor": [0.1],
    "act_fn": ["gelu", "mish", "silu"],
    "attention_head_dim": [2, 4, 8, [4, 4]],
    "time_cond_proj_dim": [8],
    "cross_attention_dim": [128, 64, [128, 128]],
    "center_input_sample": [True],
    "flip_sin_to_cos": [False],
    "freq_shift": [1],
    "norm_eps": [1e-3],
    "mid_block_scale_factor": [2],
    "downsample_padding": [0],
    "only_cross_attention": [True],
    "upcast_attention": [True],
    "resnet_time_scale_shift": ["scale_shift"],
    "hidden_act": ["gelu", "quick_gelu"],
    "num_hidden_layers": [1, 3],
    "num_attention_heads": [2, 4, 8],
    "layer_norm_eps": [1e-3],
    "max_position_embeddings": [8, 77],
    "vocab_size": [100, 3038],
    "use_attention_mask": [True],
    "dtype": ["float16", "bfloat16", "float32"],
    "model_max_length": [8, 16, 77, 1e30, 10**30, None, 2, 0],
    "pad_token": ["!", "<|endoftext|>"],
    "tokenizer_class": ["BertTokenizer", "CLIPTokenizer"],
    "unet": [["diffusers", "UNet2DModel"], ["evil", "Evil"], [None, None]],
    "vae": [["diffusers", "AutoencoderTiny"], [None, None]],
    "text_encoder": [["transformers", "CLIPTextModelWithProjection"], [None, None]],
    "scheduler": [["diffusers", name] for name in ("LCMScheduler", "PNDMScheduler", "EulerDiscreteScheduler")],
}  # fmt: skip
STRAY = {"clip_sample": True, "set_alpha_to_one": False, "skip_prk_steps": True, "solver_order": 3, "made_up": 1}


@dataclass(frozen=True)
class Outcome:
    """What became of a folder.

    Args:
        kind: "equal", "warned", "refused", or what is a fault.
        change: What was changed.
        message: The warning, the error or the difference.
    """

    kind: str
    change: str
    message: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether it should not have been so."""
        return self.kind not in ("equal", "warned", "refused")


class StepsToTheNextTime(DDIMScheduler):
    """DDIM as it is meant: `DDIMScheduler` steps from t to t − T//n, which need not be the next of its timesteps."""

    def step(self, model_output, timestep, sample, **options):
        times = [*self.timesteps.tolist(), -1]
        following = times[times.index(int(timestep)) + 1]
        config, steps = self._internal_dict, self.num_inference_steps
        self._internal_dict = FrozenDict({**config, "num_train_timesteps": int(timestep) - following})
        self.num_inference_steps = 1
        result = super().step(model_output, timestep, sample, **options)
        self._internal_dict, self.num_inference_steps = config, steps
        return result


def write_base_folder(folder: Path, scheduler: str) -> Path:
    """Write a small folder with the whole configuration of a scheduler."""
    import diffusers

    make_tiny_stable_diffusion(folder, _class_name=scheduler)
    numbers = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    if scheduler == "DPMSolverMultistepScheduler":
        numbers["timestep_spacing"] = "trailing"  # with its other spacings it is always warned about
    getattr(diffusers, scheduler)(**numbers).save_pretrained(folder / "scheduler")
    return folder


def changed(config: dict, rng: random.Random) -> str:
    """Change one key of a configuration; return what was done."""
    key = rng.choice(sorted(config))
    how = rng.choice(["drop", "rename", "anything", "likely", "likely", "likely", "stray"])
    if how == "likely":
        key = rng.choice(sorted(config.keys() & LIKELY.keys()) or [key])
    if how == "drop":
        del config[key]
        return f"dropped {key}"
    if how == "rename":
        config[key + "_"] = config.pop(key)
        return f"renamed {key}"
    if how == "stray":
        key = rng.choice(sorted(STRAY))
        config[key] = STRAY[key]
    else:
        config[key] = copy.deepcopy(rng.choice(LIKELY.get(key, ANYTHING) if how == "likely" else ANYTHING))
    return f"{key} = {str(config[key])[:60]}"


def fuzz(folder: Path, bases: dict[str, Path], seed: int) -> str:
    """Write the folder of a seed; return what was changed."""
    rng = random.Random(seed)
    base = bases[rng.choice(sorted(bases))]
    shutil.copytree(base, folder, copy_function=os.link)
    changes = []
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choices(list(FILES), weights=list(FILES.values()))[0]
        config = json.loads((folder / name).read_text())
        changes.append(f"{name}: {changed(config, rng)}")
        (folder / name).unlink()
        (folder / name).write_text(json.dumps(config))
    return f"{base.name}; " + "; ".join(changes)


def reference(
    folder: Path, noise_shape: tuple[int, ...], num_steps: int
) -> tuple[torch.Tensor, list[float], list[float]]:
    """Return the images of diffusers' pipeline with DDIM's steps, its times, and those of the folder's scheduler."""
    unused = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    pipeline = StableDiffusionPipeline.from_pretrained(folder, **unused)
    pipeline.set_progress_bar_config(disable=True)
    own = pipeline.scheduler
    config = {key: value for key, value in own.config.items() if not key.startswith("_")} | {"clip_sample": False}
    if not hasattr(own, "final_alpha_cumprod"):
        config.pop("set_alpha_to_one", None)  # of another class: the scheduler itself does not read it
    evenly = config.get("timestep_spacing") == "leading" or (
        config.get("timestep_spacing") == "trailing" and own.config.num_train_timesteps % num_steps == 0
    )
    pipeline.scheduler = (DDIMScheduler if evenly else StepsToTheNextTime).from_config(config)
    noise = torch.randn(noise_shape, generator=torch.Generator().manual_seed(0))
    images = pipeline(
        PROMPTS, num_inference_steps=num_steps, guidance_scale=GUIDANCE_SCALE, latents=noise, output_type="pt"
    ).images
    grid = pipeline.scheduler.timesteps.double().tolist()
    if num_steps < 4:  # too few for some
        return images, grid, grid
    own.set_timesteps(num_steps)
    return images, grid, sorted(set(own.timesteps.double().tolist()), reverse=True)


def judge(folder: Path, change: str) -> Outcome:
    """Load and sample a folder here and there, and compare."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = load_model(folder)
        except Exception as error:
            is_named = type(error) in (ValueError, FileNotFoundError) and str(folder) in str(error)
            return Outcome("refused" if is_named else "unnamed", change, f"{type(error).__name__}: {error}")
    said = [str(warning.message) for warning in caught if str(folder) in str(warning.message)]
    num_steps = max(1, min(4, model.schedule.num_train_timesteps // 2))
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    times = model.schedule.timesteps(num_steps)
    with torch.no_grad():
        conditioning = model.encode_prompts(PROMPTS)
        images = model.decode(sample_latents(model, noise, conditioning, times, guidance_scale=GUIDANCE_SCALE))
    if said:
        return Outcome("warned", change, said[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected, grid, walked = reference(folder, noise.shape, num_steps)
        except Exception as error:
            return Outcome("only here", change, f"{type(error).__name__}: {error}")
    ours = times[:-1].tolist()
    apart = max(abs(a - b) for a, b in zip(ours, walked, strict=False)) if len(walked) == len(ours) else 0.0
    if ours != grid or apart > 0.5:  # Euler's own linspace is not rounded
        return Outcome("other times", change, f"here {ours}, DDIM {grid}, the folder's own scheduler {walked}")
    if images.shape != expected.shape or not (images - expected).abs().max() <= TOLERANCE:
        return Outcome("other images", change, f"{(images - expected).abs().max():.2g}")
    return Outcome("equal", change)


def outcomes(seeds: range):
    """Yield the outcome of each seed's folder."""
    with tempfile.TemporaryDirectory() as root:
        bases = {name: write_base_folder(Path(root) / "bases" / name, name) for name in SCHEDULERS}
        for seed in seeds:
            folder = Path(root) / f"folder{seed}"
            change = fuzz(folder, bases, seed)
            yield seed, judge(folder, change)
            shutil.rmtree(folder)


if __name__ == "__main__":
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    for number, outcome in outcomes(range(*map(int, sys.argv[1:3]))):
        counts[outcome.kind] += 1
        if outcome.is_fault or sys.argv[3:]:
            print(number, outcome.kind, "|", outcome.change, "|", outcome.message[:300], flush=True)
    print(dict(counts))
    sys.exit(any(Outcome(kind, "").is_fault for kind in counts))
