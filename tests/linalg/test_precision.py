"""Whatever the training around them has set, projections are multiplied out in float32 at least."""

import subprocess
import sys

import pytest
import torch

from lowrank_pl.linalg import product_dtype

CPU = torch.device("cpu")
NEWER = """
import torch
from lowrank_pl.linalg import product_dtype
torch.backends.cuda.matmul.fp32_precision = "tf32"
torch.backends.mkldnn.matmul.fp32_precision = "bf16"
assert product_dtype(torch.float32, torch.device("cuda")) == torch.float64
assert product_dtype(torch.float32, torch.device("cpu")) == torch.float64
torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "ieee"
assert product_dtype(torch.float32, torch.device("cuda")) == torch.float32
"""


@pytest.fixture(params=["highest", "high", "medium"])
def precision(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_matmul_precision(precision, device):
    expected = torch.float32 if precision == "highest" else torch.float64
    assert product_dtype(torch.float32, torch.device(device)) == expected
    for other in (torch.float64, torch.bfloat16):
        assert product_dtype(other, torch.device(device)) == other


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert product_dtype(torch.float32, CPU) == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert product_dtype(torch.float32, CPU) == torch.float32


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="since PyTorch 2.9")
def test_newer_settings():
    """In a process of its own, since mixing them with the older ones makes PyTorch raise later."""
    subprocess.run([sys.executable, "-c", NEWER], check=True)
