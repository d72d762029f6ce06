"""In which type to multiply."""

import torch


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type itself, or float64 where products of float32 tensors lose digits on this device: under autocast, and
    after `torch.set_float32_matmul_precision("high")` or `"medium"`, which Lightning recommends on GPUs.

    TF32 has 11 bits: a low-rank weight that is multiplied out in it has full rank again.
    """
    if dtype != torch.float32:
        return dtype
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if precision is None:  # before PyTorch 2.9; since then asking this way may raise
        precision = torch.get_float32_matmul_precision()
    reduced = precision not in ("ieee", "none", "highest") or torch.is_autocast_enabled(device.type)
    return torch.float64 if reduced else dtype
