"""What training a published model needs of a GPU's memory, by calculation, without its weights.

    python benchmarks/memory.py                       # all of them: LoRA, bf16, with gradient checkpointing
    python benchmarks/memory.py --names emoji --check # calculated and measured, on this machine
    python benchmarks/memory.py --text-encoders       # what reads the prompts

The network is built from its published configuration without memory for its numbers (torch's FakeTensorMode), and a
forward and a backward pass of a micro-batch are run on shapes alone: what is alive at the worst moment is what a device
has to hold. The rest is a formula:

    frozen      bytes·P                         once: environment, policy and reference share it
    trained     full: (4 + 4 + 8)·P, weights, gradient and AdamW's two moments in float32, beside the frozen ones
                LoRA: 16·P_LoRA                 EMA: 4 bytes more for each trained weight
    passes      M·activations + what one block holds that is computed again, measured as above
    rollout     4·(T + 1)·B·C·h·w               on the device; 0 with Rollouts(device="cpu")
    prompts     4·(tokens·width + pooled)       of each prompt that is kept, and that a lane holds
    text        bytes·P                         on the device until release_text_encoders(); on the CPU with offload

With `--processes N` (`accelerate launch --use_fsdp`) it is what each of N processes holds: frozen weights, and what is
trained by `Full()`, divided by N; LoRA's layers are whole. What is gathered for a pass comes on top: bytes a weight
(4 for a copy that is trained) of the largest unit with all units around it, and of the largest unit once more, which is
the next one under way; with the gradient of the largest, where it is trained.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import tyro
from diffusers import FluxTransformer2DModel, ModelMixin, SD3Transformer2DModel, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

GIB = 2**30
TARGETS = {
    "unet": ["to_k", "to_q", "to_v", "to_out.0"],
    "sd3": ["attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0"],
    "flux": ["attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0"],
}
"""What the families adapt by default."""


@dataclass(frozen=True)
class Published:
    """A published model.

    Args:
        network: Its denoiser's class.
        config: Its configuration.
        latents: [C, h, w] at its own image size.
        text: [tokens, width] of a prompt.
        targets: The layers that LoRA adapts.
        pooled: The width of the pooled embedding; 0: none.
        passes: Passes per sample: 2 with classifier-free guidance.
        text_encoders: The networks that read prompts.
    """

    network: type[ModelMixin]
    config: Mapping[str, Any]
    latents: tuple[int, int, int]
    text: tuple[int, int]
    targets: str = "unet"
    pooled: int = 0
    passes: int = 2
    text_encoders: tuple[str, ...] = ()

    def inputs(self, batch: int, dtype: torch.dtype) -> dict[str, Any]:
        """Return the arguments of a pass."""
        channels, height, width = self.latents
        latents = torch.zeros(batch, channels, height, width, dtype=dtype)
        times, text = torch.zeros(batch), torch.zeros(batch, *self.text, dtype=dtype)
        pooled = torch.zeros(batch, self.pooled, dtype=dtype)
        if self.network is UNet2DConditionModel:
            added = {"text_embeds": pooled, "time_ids": torch.zeros(batch, 6)} if self.pooled else None
            return {"sample": latents, "timestep": times, "encoder_hidden_states": text, "added_cond_kwargs": added}
        common = {"timestep": times, "encoder_hidden_states": text, "pooled_projections": pooled}
        if self.network is SD3Transformer2DModel:
            return {"hidden_states": latents, **common}
        tokens = (height // 2) * (width // 2)
        return {
            "hidden_states": torch.zeros(batch, tokens, channels * 4, dtype=dtype),
            **common,
            "guidance": torch.zeros(batch) if self.config.get("guidance_embeds") else None,
            "img_ids": torch.zeros(tokens, 3),
            "txt_ids": torch.zeros(self.text[0], 3),
        }


_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_XXL = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
TEXT_ENCODERS = {
    "CLIP-L": lambda: CLIPTextModel(CLIPTextConfig(**_L)),
    "CLIP-bigG": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**_G, projection_dim=1280)),
    "T5-XXL": lambda: T5EncoderModel(T5Config(**_XXL, feed_forward_proj="gated-gelu")),
}
_SD3 = {"attention_head_dim": 64, "joint_attention_dim": 4096, "in_channels": 16, "pooled_projection_dim": 2048}
MODELS = {
    "emoji": Published(
        UNet2DConditionModel,
        {
            "sample_size": 16,
            "block_out_channels": [64, 128, 192],
            "layers_per_block": 1,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "cross_attention_dim": 128,
            "attention_head_dim": 4,
            "norm_num_groups": 16,
        },
        (4, 16, 16),
        (16, 128),
    ),
    "stable-diffusion-v1-5": Published(
        UNet2DConditionModel,
        {"cross_attention_dim": 768, "attention_head_dim": 8},
        (4, 64, 64),
        (77, 768),
        text_encoders=("CLIP-L",),
    ),
    "stable-diffusion-xl-base-1.0": Published(
        UNet2DConditionModel,
        {
            "sample_size": 128,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "use_linear_projection": True,
        },
        (4, 128, 128),
        (77, 2048),
        pooled=1280,
        text_encoders=("CLIP-L", "CLIP-bigG"),
    ),
    "stable-diffusion-3.5-medium": Published(
        SD3Transformer2DModel,
        {
            **_SD3,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": tuple(range(13)),
        },
        (16, 128, 128),
        (333, 4096),
        "sd3",
        pooled=2048,
        text_encoders=("CLIP-L", "CLIP-bigG", "T5-XXL"),
    ),
    "stable-diffusion-3.5-large": Published(
        SD3Transformer2DModel,
        {
            **_SD3,
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        (16, 128, 128),
        (333, 4096),
        "sd3",
        pooled=2048,
        text_encoders=("CLIP-L", "CLIP-bigG", "T5-XXL"),
    ),
    "FLUX.1-dev": Published(
        FluxTransformer2DModel,
        {"guidance_embeds": True},
        (16, 128, 128),
        (512, 4096),
        "flux",
        pooled=768,
        passes=1,
        text_encoders=("CLIP-L", "T5-XXL"),
    ),
}


class PeakMemory(TorchDispatchMode):
    """The largest number of bytes that results of operations in this context held at once, parameters not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Callable, types: object, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in inputs | self._known:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def forget() -> None:
            self._known.discard(key)
            self.now -= size

        self._known.add(key)
        weakref.finalize(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)


@dataclass
class Args:
    """What to train, and how."""

    names: tuple[str, ...] = tuple(MODELS)
    """The models."""
    adaptation: tuple[str, ...] = ("lora", "full")
    """ "full", or "lora" of `rank`."""
    rank: int = 16
    """LoRA's."""
    micro_batch: int = 1
    """Samples in a backward pass."""
    checkpointing: tuple[bool, ...] = (True, False)
    """Gradient checkpointing."""
    processes: int = 1
    """Processes that share the weights."""
    num_steps: int = 28
    """Denoising steps, for the rollout."""
    samples: int = 64
    """Samples of a rollout."""
    text_encoders: bool = False
    """The text encoders' memory instead."""
    check: bool = False
    """Measure what torch's allocator gives out, too: on the CPU, in float32, without the gradients."""


def build(model: Published, dtype: torch.dtype, args: Args, adaptation: str, *, checkpointing: bool) -> torch.nn.Module:
    """Return the network that is trained, in the dtype of its arithmetic."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        network = model.network(**model.config)
    finally:
        torch.set_default_dtype(before)
    if adaptation == "lora":
        network.requires_grad_(False)
        network.add_adapter(LoraConfig(r=args.rank, target_modules=TARGETS[model.targets]))
    if checkpointing:
        network.enable_gradient_checkpointing()
    return network.train()


def on_shapes_alone(network: torch.nn.Module) -> torch.nn.Module:
    """Return a network of the meta device with parameters and buffers as a CPU's would be, in a FakeTensorMode."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, torch.nn.Parameter(empty, requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    return network


def passes(model: Published, network: torch.nn.Module, batch: int, dtype: torch.dtype) -> None:
    """Run one forward and one backward pass."""
    output = network(**model.inputs(batch, dtype), return_dict=False)[0]
    output.float().square().sum().backward()


def unit_sizes(network: torch.nn.Module) -> dict[str, int]:
    """Return the number of weights of each unit that is gathered as one, by its name; "" is what is in none."""
    names = [name for name, module in network.named_modules() if type(module).__name__ in network._no_split_modules]
    sizes = dict.fromkeys(["", *names], 0)
    for name, weight in network.named_parameters():
        if "lora_" not in name:
            sizes[max((unit for unit in sizes if name.startswith(f"{unit}.")), key=len, default="")] += weight.numel()
    return sizes


def gathered(sizes: dict[str, int]) -> int:
    """Return the number of weights that are whole at once, of the units' sizes."""
    around = [
        sum(size for other, size in sizes.items() if other in ("", unit) or unit.startswith(f"{other}."))
        for unit in sizes
    ]
    return max(around) + max(size for unit, size in sizes.items() if unit)


def row(name: str, model: Published, args: Args, adaptation: str, *, checkpointing: bool) -> list[str]:
    """Return a line of the table, in GiB."""
    dtype = torch.float32 if args.check else torch.bfloat16
    with torch.device("meta"):
        network = build(model, dtype, args, adaptation, checkpointing=checkpointing)
    total = sum(parameter.numel() for parameter in network.parameters())
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    with FakeTensorMode():
        on_shapes_alone(network)
        if args.processes > 1:
            for parameter in network.parameters():
                if parameter.requires_grad:  # divided at once, and so in "trained"
                    parameter.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
        with PeakMemory() as memory:
            passes(model, network, model.passes * args.micro_batch, dtype)
    frozen = total if adaptation == "full" else total - trained
    gradients = trained * dtype.itemsize if args.processes == 1 else 0  # already in the peak
    is_full = adaptation == "full"
    whole = 0
    if args.processes > 1:
        sizes = unit_sizes(network)
        largest = max(size for unit, size in sizes.items() if unit)
        whole = 4 * (gathered(sizes) + largest) if is_full else dtype.itemsize * gathered(sizes)
    parts = {
        "frozen": frozen * dtype.itemsize / args.processes,
        "trained": (16 * trained - (4 * trained if is_full and dtype == torch.float32 else 0))
        / (args.processes if is_full else 1),
        "gathered": whole,
        "passes": memory.peak - gradients,
        "rollout": 4 * (args.num_steps + 1) * args.samples * torch.Size(model.latents).numel(),
    }
    figures = [f"{value / GIB:.2f}" for value in (*parts.values(), sum(parts.values()))]
    return [name, f"{total / 1e9:.2f}", adaptation, "yes" if checkpointing else "no", *figures]


def measured(name: str, args: Args, adaptation: str, *, checkpointing: bool) -> float:
    """Return the most that torch's allocator has given out in a real forward and backward pass, in GiB."""
    network = build(MODELS[name], torch.float32, args, adaptation, checkpointing=checkpointing)
    passes(MODELS[name], network, 1, torch.float32)  # the gradients, which are in "trained"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        passes(MODELS[name], network, MODELS[name].passes * args.micro_batch, torch.float32)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events)) / GIB


def print_text_encoders(names: tuple[str, ...]) -> None:
    """Print what the text encoders of models hold, in GiB."""
    print("| text encoder | parameters (10⁹) | float32 | bfloat16 | of |")
    print("|" + "---|" * 5)
    for encoder, build in TEXT_ENCODERS.items():
        with torch.device("meta"):
            total = sum(parameter.numel() for parameter in build().parameters())
        figures = [f"{total / 1e9:.2f}", f"{4 * total / GIB:.2f}", f"{2 * total / GIB:.2f}"]
        owners = [name for name in names if encoder in MODELS[name].text_encoders]
        print("| " + " | ".join([encoder, *figures, ", ".join(owners)]) + " |")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.text_encoders:
        print_text_encoders(args.names)
        return
    header = ["model", "parameters (10⁹)", "trained", "checkpointing", "frozen", "trained", "gathered", "passes"]
    header += ["rollout", "all"]
    print("| " + " | ".join([*header, *(["passes, measured"] if args.check else [])]) + " |")
    print("|" + "---|" * (len(header) + args.check))
    for name in args.names:
        for adaptation in args.adaptation:
            for checkpointing in args.checkpointing:
                line = row(name, MODELS[name], args, adaptation, checkpointing=checkpointing)
                if args.check:
                    line.append(f"{measured(name, args, adaptation, checkpointing=checkpointing):.2f}")
                print("| " + " | ".join(line) + " |", flush=True)


if __name__ == "__main__":
    main()
