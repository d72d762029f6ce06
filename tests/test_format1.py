"""Files of 0.1.0 are read, and runs of it go on as it would have gone on."""

import sys
from pathlib import Path

import pytest
import torch
from nets import Net
from safetensors.torch import load_file

from lowrank_pl import load_compressed

FOLDER = Path(__file__).parent / "format1"
sys.path.insert(0, str(FOLDER))
import write  # noqa: E402


@pytest.mark.parametrize("name", write.FITS)
def test_a_fit_goes_on_from_its_checkpoint(name, tmp_path):
    """Bit by bit on the machine that wrote the files; elsewhere sums are rounded differently."""
    _, extract = write.fit(name, tmp_path, FOLDER / f"{name}-step=7.ckpt")
    expected, found = (load_file(folder / f"{name}.safetensors") for folder in (FOLDER, tmp_path))
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5)
    torch.manual_seed(1)
    x = torch.randn(3, 3, 8, 8)
    before = load_compressed(Net(), FOLDER / name)
    torch.testing.assert_close(extract.extracted(x), before(x), rtol=1e-3, atol=1e-4)
    kinds = [
        {k: v["structure"] for k, v in net.lowrank_pl_record["layers"].items()} for net in (before, extract.extracted)
    ]
    for one, other in zip(*(k.values() for k in kinds), strict=True):
        assert {**one, "run": None} == {**other, "run": None}  # which of two ways of running is faster is measured
    assert kinds[0].keys() == kinds[1].keys()


def test_all_kinds_are_there():
    kinds = set()
    for name in write.FITS:
        for entry in load_compressed(Net(), FOLDER / name).lowrank_pl_record["layers"].values():
            kinds.add(entry["structure"]["kind"])
    assert {"chain", "tiles"} <= kinds
