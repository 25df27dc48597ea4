"""Model folders whose configurations are changed at random, and what becomes of each here and in diffusers.

    python -m tests.diffusion_gym.models.fuzzed_folders 0 1000                  # of all families
    python -m tests.diffusion_gym.models.fuzzed_folders 0 1000 flux-dev all     # of one, and to see every folder

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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from diffusion_gym.models import load_model
from tests.families import FAMILIES, Family, open_pipeline
from tests.tiny import make_tiny_stable_diffusion

PROMPTS = ["a cat", "an ant on a pink background"]
TOLERANCE = 2e-3

# Some read by a scheduler of another class than DDIM's: the folder of each is what diffusers' `save_pretrained` writes.
SCHEDULERS = (
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
)
# How often each file is changed; others of its name as often as the last.
FILES = {
    "model_index.json": 3,
    "scheduler/scheduler_config.json": 8,
    "unet/config.json": 6,
    "transformer/config.json": 6,
    "vae/config.json": 4,
    "config.json": 4,
    "tokenizer_config.json": 3,
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
    "model_type": [["a"], "t5", "clip_text_model", "bert", None],
    "eos_token_id": [[], [3036], None, 1, 2, 3036, 49407],
    "projection_dim": [16, 24],
    "force_zeros_for_empty_prompt": [True, False],
    "addition_time_embed_dim": [8, 16],
    "transformer_layers_per_block": [1, [1, 2]],
    "original_inference_steps": [2, 10, 50],
    "timestep_scaling": [1.0, 10.0],
    "shift": [1.0, 3.0, 0, -1],
    "use_dynamic_shifting": [True, False],
    "base_shift": [0.5, 1.0, None],
    "max_shift": [0.5, 1.15, None],
    "base_image_seq_len": [4, 256],
    "max_image_seq_len": [256, 4096],
    "time_shift_type": ["exponential", "linear", "cubic"],
    "shift_terminal": [0.1, 0],
    "invert_sigmas": [True],
    "stochastic_sampling": [True],
    "patch_size": [1, 2, 4],
    "num_layers": [0, 1, 2, 3],
    "num_single_layers": [0, 1, 2],
    "joint_attention_dim": [48, 80, 128],
    "caption_projection_dim": [32, 64],
    "pooled_projection_dim": [24, 32, 48],
    "pos_embed_max_size": [2, 4, 8, 96],
    "dual_attention_layers": [[], [0], [1], [0, 1]],
    "qk_norm": ["rms_norm", None, "layer_norm"],
    "guidance_embeds": [True, False],
    "axes_dims_rope": [[4, 6, 6], [6, 4, 6], [8, 8], [16], [2, 8, 6]],
    "_max_sequence_length": [0, 16, 77, 256, 1000],
    "feed_forward_proj": ["relu", "gelu", "gated-gelu"],
    "relative_attention_num_buckets": [8, 32],
    "relative_attention_max_distance": [16, 128],
    "layer_norm_epsilon": [1e-3],
    "d_kv": [8, 16],
    "d_model": [48, 80],
    "num_heads": [1, 2, 4],
    "text_encoder_2": [["transformers", "CLIPTextModel"], ["transformers", "T5EncoderModel"], [None, None]],
    "text_encoder_3": [["transformers", "T5EncoderModel"], [None, None], None],
    "tokenizer_3": [["transformers", "T5TokenizerFast"], [None, None], ["transformers", "CLIPTokenizer"]],
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


def _write_stable_diffusion(folder: Path, scheduler: str) -> Path:
    """Write a small folder with the whole configuration of a scheduler."""
    import diffusers

    make_tiny_stable_diffusion(folder, _class_name=scheduler)
    numbers = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    if scheduler == "DPMSolverMultistepScheduler":
        numbers["timestep_spacing"] = "trailing"  # with its other spacings it is always warned about
    getattr(diffusers, scheduler)(**numbers).save_pretrained(folder / "scheduler")
    return folder


STABLE_DIFFUSION = tuple(
    replace(FAMILIES[0], name=name, write=partial(_write_stable_diffusion, scheduler=name)) for name in SCHEDULERS
)
BASES = (*STABLE_DIFFUSION, *FAMILIES[1:])


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


def _weight(name: str) -> int:
    """Return how often a file is changed, 0 for none."""
    return next((weight for end, weight in FILES.items() if name == end or name.endswith(f"/{end}")), 0)


def fuzz(folder: Path, base: Path, rng: random.Random) -> str:
    """Write a changed copy of a base folder; return what was changed."""
    shutil.copytree(base, folder, copy_function=os.link)
    weights = {name: _weight(name) for name in sorted(str(file.relative_to(base)) for file in base.rglob("*.json"))}
    changes = []
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choices(list(weights), weights=list(weights.values()))[0]
        config = json.loads((folder / name).read_text())
        changes.append(f"{name}: {changed(config, rng)}")
        (folder / name).unlink()
        (folder / name).write_text(json.dumps(config))
    return f"{base.name}; " + "; ".join(changes)


def _with_its_own_limits(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Set tokenizers' lengths to the text encoders': with none, or one beyond that, the pipeline itself fails."""
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = getattr(pipeline, name, None)
        config = getattr(getattr(pipeline, name.replace("tokenizer", "text_encoder"), None), "config", None)
        if tokenizer is not None and hasattr(config, "max_position_embeddings"):
            tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    if hasattr(pipeline, "tokenizer_max_length"):
        pipeline.tokenizer_max_length = pipeline.tokenizer.model_max_length
    return pipeline


def _with_ddim(pipeline: DiffusionPipeline, num_steps: int) -> tuple[list[float], list[float]]:
    """Give a pipeline DDIM's steps; return its times, and those of the scheduler that it had."""
    own = pipeline.scheduler
    config = {key: value for key, value in own.config.items() if not key.startswith("_")} | {"clip_sample": False}
    if not hasattr(own, "final_alpha_cumprod"):
        config.pop("set_alpha_to_one", None)  # of another class: the scheduler itself does not read it
    evenly = config.get("timestep_spacing") == "leading" or (
        config.get("timestep_spacing") == "trailing" and own.config.num_train_timesteps % num_steps == 0
    )
    pipeline.scheduler = (DDIMScheduler if evenly else StepsToTheNextTime).from_config(config)
    pipeline.scheduler.set_timesteps(num_steps)
    grid = pipeline.scheduler.timesteps.double().tolist()
    if num_steps < 4:  # too few for some
        return grid, grid
    own.set_timesteps(num_steps)
    return grid, sorted(set(own.timesteps.double().tolist()), reverse=True)


def judge(folder: Path, change: str, family: Family) -> Outcome:
    """Load and sample a folder here and there, and compare."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = load_model(folder, image_size=family.told_size)
        except Exception as error:
            is_named = type(error) in (ValueError, FileNotFoundError) and str(folder) in str(error)
            return Outcome("refused" if is_named else "unnamed", change, f"{type(error).__name__}: {error}")
    said = [str(warning.message) for warning in caught if str(folder) in str(warning.message)]
    num_steps = max(1, min(4, model.schedule.num_train_timesteps // 2))
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    try:
        images = family.sample(model, PROMPTS, noise, num_steps=num_steps)
    except Exception as error:
        return Outcome("late", change, f"{type(error).__name__}: {error}")
    if said:
        return Outcome("warned", change, said[0])
    grid = walked = ours = model.schedule.timesteps(num_steps)[:-1].tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pipeline = _with_its_own_limits(open_pipeline(folder, torch_dtype=torch.float32))
            if model.prediction_type != "flow" and model.guidance == "classifier_free":
                grid, walked = _with_ddim(pipeline, num_steps)
            size = model.image_size
            images_there = family.draw(folder, PROMPTS, noise, num_steps=num_steps, pipeline=pipeline, image_size=size)
        except Exception as error:
            return Outcome("only here", change, f"{type(error).__name__}: {error}")
    apart = max(abs(a - b) for a, b in zip(ours, walked, strict=False)) if len(walked) == len(ours) else 0.0
    if ours != grid or apart > 0.5:  # Euler's own linspace is not rounded
        return Outcome("other times", change, f"here {ours}, DDIM {grid}, the folder's own scheduler {walked}")
    if images.shape != images_there.shape or not (images - images_there).abs().max() <= TOLERANCE:
        return Outcome("other images", change, f"{(images - images_there).abs().max():.2g}")
    return Outcome("equal", change)


def outcomes(seeds: range, families: tuple[Family, ...] = BASES) -> Iterator[tuple[int, Outcome]]:
    """Yield the outcome of each seed's folder, of one of the families."""
    with tempfile.TemporaryDirectory() as root:
        bases = [(family, family.write(Path(root) / "bases" / family.name)) for family in families]
        for seed in seeds:
            rng, folder = random.Random(seed), Path(root) / f"folder{seed}"
            family, base = rng.choice(bases)
            change = fuzz(folder, base, rng)
            yield seed, judge(folder, change, family)
            shutil.rmtree(folder)


if __name__ == "__main__":
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    named = tuple(family for family in BASES if family.name in sys.argv[3:])
    for number, outcome in outcomes(range(*map(int, sys.argv[1:3])), named or BASES):
        counts[outcome.kind] += 1
        if outcome.is_fault or "all" in sys.argv[3:]:
            print(number, outcome.kind, "|", outcome.change, "|", outcome.message[:300], flush=True)
    print(dict(counts))
    sys.exit(any(Outcome(kind, "").is_fault for kind in counts))
