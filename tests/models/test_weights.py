"""Weights from a file."""

import pytest
import torch
from safetensors.torch import save_file

from lowrank_pl.models import CifarResNet, LeNet300, load_weights


def test_round_trip(tmp_path):
    saved, net = CifarResNet(depth=8), CifarResNet(depth=8)
    saved.bn1.running_mean.normal_()
    save_file(saved.state_dict(), tmp_path / "net.safetensors")
    load_weights(net, tmp_path / "net.safetensors")
    loaded = net.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in saved.state_dict().items())


def test_files_from_before_num_batches_tracked(tmp_path):
    state = {k: v for k, v in CifarResNet(depth=8).state_dict().items() if not k.endswith("tracked")}
    save_file(state, tmp_path / "net.safetensors")
    net = CifarResNet(depth=8)
    load_weights(net, str(tmp_path / "net.safetensors"))
    assert torch.equal(net.conv1.weight, state["conv1.weight"])


def test_a_file_that_does_not_fit(tmp_path):
    state = LeNet300().state_dict()
    state["fc4.bias"] = state.pop("fc1.bias")
    state["fc2.weight"] = state["fc2.weight"][:, :7].contiguous()
    save_file(state, tmp_path / "other.safetensors")
    net = LeNet300()
    before = net.fc3.weight.clone()
    with pytest.raises(ValueError) as error:
        load_weights(net, tmp_path / "other.safetensors")
    message = str(error.value)
    assert "other.safetensors does not fit LeNet300: 1 missing (fc1.bias); 1 unexpected (fc4.bias)" in message
    assert "fc2.weight [100, 7] instead of [100, 300]" in message
    assert torch.equal(net.fc3.weight, before)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors: set `model\.weights`"):
        load_weights(LeNet300(), tmp_path / "absent.safetensors")


def test_not_a_safetensors_file(tmp_path):
    (tmp_path / "net.pt").write_bytes(b"PK something else, long enough to look like a file")
    with pytest.raises(ValueError, match=r"net\.pt is not a safetensors file.*model\.weights"):
        load_weights(LeNet300(), tmp_path / "net.pt")
