"""Forms of one network side by side: what is wrong with one is said, never averaged away."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lowrank_pl.evaluation import evaluate, evaluation_table, problems_of
from lowrank_pl.run_files import as_json

IMAGES = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 3
NET = nn.Linear(6, 3).requires_grad_(False)
NAN = float("nan")


def results_of(form: Callable[[Tensor], Tensor], compressed: Callable[[Tensor], Tensor] = NET) -> dict:
    batches = list(zip(IMAGES.split(8), LABELS.split(8), strict=True))
    return evaluate({"dense": NET, "compressed": compressed, "onnx": form}, batches, lambda size: IMAGES[:size])


def spoilt(value: float, at: int) -> Callable[[Tensor], Tensor]:
    """NaN or the like for one image, in one batch."""

    def run(x: Tensor) -> Tensor:
        outputs = NET(x)
        outputs[(x == IMAGES[at]).all(1), 1] = value
        return outputs

    return run


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 20, 39])
def test_one_nan_in_one_image_is_a_problem(value: float, at: int) -> None:
    results = results_of(spoilt(value, at))
    assert results["onnx"]["not_finite"] == 1
    assert results["onnx"]["difference"] is None
    assert problems_of(results) == ["onnx gives NaN or infinity for 1 images: export it again"]
    assert "NaN" not in as_json(results).decode()
    assert json.loads(as_json(results)) == results
    evaluation_table(results)


def test_so_it_is_in_the_compressed_network() -> None:
    results = results_of(spoilt(NAN, 5), spoilt(NAN, 5))
    assert problems_of(results) == [
        "compressed gives NaN or infinity for 1 images: train it again",
        "onnx gives NaN or infinity for 1 images: export it again",
    ]
    assert len(problems_of(results_of(NET, spoilt(NAN, 5)))) == 2  # nothing can be compared with it


def test_differences_are_problems_from_a_thousandth_on() -> None:
    assert problems_of(results_of(NET)) == []
    assert problems_of(results_of(lambda x: NET(x) * 1.0001)) == []
    (problem,) = problems_of(results_of(lambda x: NET(x) * 1.01))
    assert problem == "onnx does not agree with the compressed network: export it again"


@pytest.mark.parametrize("form", [lambda x: NET(x)[:, :2], lambda x: NET(x)[:-1], lambda x: NET(x)[..., None]])
def test_outputs_of_another_shape_are_named(form: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"onnx: expected outputs of shape \[8, 3\] but got"):
        results_of(form)
