"""A compressed network as it runs fastest on this machine, of plain layers as far as that goes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lowrank_pl.exporting import disagreement
from lowrank_pl.extraction import RECORD
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import DEPLOYED, LAYER_TYPES, ConstantLayer, LazyWeight, as_operator, as_stored, build, spec_of
from lowrank_pl.norms import fold_norms_
from lowrank_pl.samples import by_keywords
from lowrank_pl.surgery import detached_copy, replace_layers
from lowrank_pl.timing import Ratio, run_all, times_ms
from lowrank_pl.tracing import Call, eager, run, slow_paths

DEPLOYMENT = "lowrank_pl_deployment"  # the attribute of a deployed network that says what was done
TOLERANCE = 1e-3  # of the largest output's size, by which the deployed network may differ
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def deploy(model: nn.Module, example_input: Any, channels_last: bool | None = None) -> nn.Module:
    """A copy of a compressed network, in evaluation mode, that gives the same outputs sooner, for batches of the size
    and on the device of `example_input`: an argument, a tuple of them, a mapping with their names, or a `Call`.

    Each compressed layer runs from its factors, or as the dense layer that they make where that is measured to be
    faster on inputs of the shapes that it gets: none is slower than its dense layer by more than noise. Batch norms
    right behind a layer, and behind nothing else, are folded into it. Convolutions run channels-last where
    `channels_last` says so, None: where the whole is measured to be faster. On the current number of threads.

    Store the compressed network, which is smaller, and deploy what is loaded. What was done is in the copy's attribute
    `lowrank_pl_deployment`: names of layers that run `dense` and of norms that were `folded`, and `channels_last`.
    Raises `RuntimeError` if outputs differ by more than 1e-3 of the largest one; the model is left as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected argument `model` to be a module but got {model!r:.100}")
    given = by_keywords(model, example_input)
    net = detached_copy(model).eval().requires_grad_(False)
    fold_norms_(net)
    with torch.no_grad(), eager(), slow_paths():  # which call hooks
        expected = run(net, given)
        if channels_last is None:
            channels_last = _is_faster(net, given)
        if channels_last:
            net = net.to(memory_format=torch.channels_last)
        net, dense = _densify(net, lambda: run(net, given))
        net, folded = _fold_norms(net, lambda: run(net, given))
        if channels_last:
            net = net.to(memory_format=torch.channels_last)
        _check(run(net, given), expected)
    for module in net.modules():  # which is no longer what the record says
        vars(module).pop(RECORD, None)
    setattr(net, DEPLOYMENT, {"dense": dense, "folded": folded, "channels_last": channels_last})
    return net


def _fold_norms(net: nn.Module, run_once: Callable[[], Any]) -> tuple[nn.Module, list[str]]:
    """Batch norms put into the layers whose outputs they alone get; the norms' names."""
    listener = _Listener()
    layers = {m: n for n, m in net.named_modules() if type(m) in LAYER_TYPES and not is_parametrized(m)}
    handles = [layer.register_forward_hook(listener.left) for layer in layers]
    norms = {m: n for n, m in net.named_modules() if type(m) in _NORMS and m.running_mean is not None}
    handles += [norm.register_forward_pre_hook(listener.entered) for norm in norms]
    with listener:
        outputs = run_once()
    listener.use(outputs)
    for handle in handles:
        handle.remove()
    new: dict[nn.Module, nn.Module] = {}
    for norm, layer in listener.pairs().items():
        new |= {layer: _folded(layer, norm), norm: nn.Identity()}
    return replace_layers(net, new), sorted(norms[norm] for norm in new if norm in norms)


def _folded(layer: Any, norm: Any) -> nn.Module:
    """A layer that does what both do. (PyTorch's own function knows no grouped transposed convolutions.)"""
    fused, spec = copy.copy(layer), spec_of(layer)
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
    shift = shift * scale if norm.bias is None else shift * scale + norm.bias
    weight = as_stored(as_operator(layer.weight, spec) * scale.view(-1, *[1] * (layer.weight.dim() - 1)), spec)
    values = {"weight": weight.to(layer.weight.dtype), "bias": shift.to(layer.weight.dtype)}
    fused._parameters = {name: nn.Parameter(value, requires_grad=False) for name, value in values.items()}
    return fused  # type: ignore[no-any-return]


class _Listener(TorchFunctionMode):
    """Which layer's outputs go to which batch norm, and where else they go."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[
            int, tuple[nn.Module, Tensor]
        ] = {}  # by identity; kept alive, so that no other takes its place
        self._uses: dict[nn.Module, int] = {}  # of a layer's outputs, by functions
        self._runs: dict[nn.Module, int] = {}
        self._sources: dict[nn.Module, list[nn.Module | None]] = {}  # of what norms get, call after call

    def left(self, layer: nn.Module, args: Any, output: Any) -> None:
        self._runs[layer] = self._runs.get(layer, 0) + 1
        self._made[id(output)] = layer, output

    def entered(self, norm: nn.Module, args: Any) -> None:
        source = self._made.get(id(args[0])) if args else None
        self._sources.setdefault(norm, []).append(None if source is None else source[0])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if any(isinstance(y, Tensor) for y in tree_leaves(output)):  # else it is asked for its shape
            self.use((args, kwargs or {}))
        return output

    def use(self, values: Any) -> None:
        """Somebody gets these, whatever of them is a layer's output."""
        for x in tree_leaves(values):
            if id(x) in self._made:
                layer = self._made[id(x)][0]
                self._uses[layer] = self._uses.get(layer, 0) + 1

    def pairs(self) -> dict[nn.Module, nn.Module]:
        """Every norm that gets the outputs of one layer alone, in all calls, where nothing else gets them."""
        found: dict[nn.Module, nn.Module] = {}
        for norm, sources in self._sources.items():
            (layer, *others) = dict.fromkeys(sources)
            if layer is None or others:
                continue
            if len(sources) == self._runs[layer] == self._uses.get(layer):
                found[norm] = layer
        return found


def _densify(net: nn.Module, run_once: Callable[[], Any]) -> tuple[nn.Module, list[str]]:
    """Compressed layers that are measured to be slower than the dense ones replaced by these; their names."""
    entries = {
        f"{start}.{name}".strip("."): entry
        for start, owner in net.named_modules()
        for name, entry in getattr(owner, RECORD, {"layers": {}})["layers"].items()
    }
    modules = dict(net.named_modules())
    small = {n: modules[n] for n in entries if isinstance(modules.get(n), DEPLOYED) and hasattr(modules[n], "bias")}
    shapes = _inputs(small, run_once)
    new, names = {}, []
    for name, module in small.items():
        if isinstance(module, ConstantLayer) or not shapes.get(name):
            continue
        layer = _dense(module, LayerSpec.from_dict(entries[name]["replaces"]))
        inputs = [make() for make in shapes[name]]
        calls = [partial(run_all, each, inputs) for each in (module, layer)]
        if Ratio.of(*times_ms(calls, inputs[0].device.type, seconds=0.06, rounds=21)).value > 1:
            new[module] = layer
            names.append(name)
    return replace_layers(net, new), names


def _dense(module: Any, spec: LayerSpec) -> nn.Module:
    """The ordinary layer with the weight and bias that a compressed one has."""
    weight = module.weight
    weight = weight.make() if isinstance(weight, LazyWeight) else weight
    bias = module.bias
    layer: Any = build(spec, bias is not None).to(weight).eval().requires_grad_(False)
    if weight.dim() == 4 and next(module.parameters()).is_contiguous(memory_format=torch.channels_last):
        layer = layer.to(memory_format=torch.channels_last)
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer  # type: ignore[no-any-return]


def _inputs(modules: dict[str, nn.Module], run_once: Callable[[], Any]) -> dict[str, list[Callable[[], Tensor]]]:
    """What makes random inputs as each module gets them, call after call."""
    found: dict[str, list[Callable[[], Tensor]]] = {}

    def heard(name: str, module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor):
            like = torch.empty_strided(args[0].shape, args[0].stride(), dtype=args[0].dtype, device="meta")
            found.setdefault(name, []).append(partial(_random_like, like, args[0].device))

    handles = [module.register_forward_pre_hook(partial(heard, name)) for name, module in modules.items()]
    try:
        run_once()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _random_like(like: Tensor, device: torch.device) -> Tensor:
    empty = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
    return empty.normal_() if empty.is_floating_point() else empty.zero_()


def _is_faster(net: nn.Module, given: Any) -> bool:
    """Whether all of it is faster channels-last."""
    call = Call.of(given)
    if not any(x.dim() == 4 for x in _tensors((call.args, dict(call.kwargs)))):
        return False
    other = detached_copy(net).to(memory_format=torch.channels_last)
    device = next((p.device.type for p in net.parameters()), "cpu")
    calls = [partial(each, *call.args, **call.kwargs) for each in (net, other)]
    return Ratio.of(*times_ms(calls, device, seconds=0.3, rounds=21)).low > 1


def _check(found: Any, expected: Any) -> None:
    pairs = zip(_tensors(found), _tensors(expected), strict=True)
    error = max((disagreement(a, b) for a, b in pairs), default=0.0)
    if not error <= TOLERANCE:
        raise RuntimeError(
            f"The deployed network's outputs differ by {error:.1e} of the largest one; expected at most "
            f"{TOLERANCE:.0e}: the network computes something else each time it runs, or this is a bug of lowrank_pl"
        )


def _tensors(outputs: Any) -> list[Tensor]:
    leaves: Iterable[Any] = tree_leaves(outputs)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
