"""torchvision's classifiers, by name."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import torchvision
from torch import nn


def torchvision_classifier(
    name: str, input_shape: Sequence[int] = (3, 224, 224), num_classes: int = 1000, pretrained: bool = False
) -> nn.Module:
    """The network `torchvision.models.get_model(name)`, without auxiliary outputs.

    `pretrained` downloads the default ImageNet weights; for another number of classes than 1000, the layers
    whose shape that changes keep their random start. Raises ValueError for an unknown name or gray images.
    """
    _check(name, input_shape)
    net: nn.Module = torchvision.models.get_model(name, num_classes=num_classes, **_options(name, input_shape))
    if pretrained:
        _load_what_fits(net, torchvision.models.get_model_weights(name))
    return net


def _check(name: str, input_shape: Sequence[int]) -> None:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        names = get_close_matches(name, known, n=5) or known
        raise ValueError(f"torchvision has no classifier {name!r}; known names: {', '.join(names)}")
    if input_shape[0] != 3:
        raise ValueError(f"{name} takes images with 3 channels, got the shape {tuple(input_shape)}")


def _options(name: str, input_shape: Sequence[int]) -> dict[str, Any]:
    if name in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": True}
    return {"image_size": input_shape[1]} if name.startswith("vit_") else {}


def _load_what_fits(net: nn.Module, weights: Any) -> None:
    own = net.state_dict()
    state = weights.DEFAULT.get_state_dict(progress=False, check_hash=True)
    fits = {key: value for key, value in state.items() if key in own and value.shape == own[key].shape}
    net.load_state_dict(fits, strict=False)
