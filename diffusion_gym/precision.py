"""Which arithmetic is fast on a device."""

import torch


def has_fast_bf16(device: torch.device | str = "cpu") -> bool:
    """Return whether a device has instructions for bfloat16.

    A processor without them, such as one with AVX2 alone, computes bfloat16 about 25 times slower than float32.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # as oneDNN finds the processor, or is told
    return kind != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
