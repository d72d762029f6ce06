"""The only place that touches a module tree: find layers, listen to one batch, copy, replace."""

from __future__ import annotations

import copy
import math
import sys
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from lowrank_pl.layers import LAYER_TYPES, FactorChain, LazyWeight

READ = "its weight is read by another module, too"
SAMPLES = 2  # inputs kept per layer, to verify the extracted layer on


def clean_name(name: str) -> str:
    """A module's dotted name without what `torch.compile` adds."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer and convolution by its dotted name, in the order of registration, shared ones once.

    Those that are the factors of a compressed layer are none.
    """
    factors = {link for chain in model.modules() if isinstance(chain, FactorChain) for link in chain}
    return {
        clean_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, LAYER_TYPES) and module not in factors
    }


def obstacles(model: nn.Module) -> dict[nn.Module, str]:
    """The layers that can be neither projected nor replaced, whatever the decomposition, and why; in one pass."""
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    read_by_attention = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    found = {}
    for layer in find_layers(model).values():
        reason = _obstacle(layer, owners)
        if reason is None and layer in read_by_attention:
            reason = "never called: attention reads its weight directly"
        if reason is not None:
            found[layer] = reason
    return found


def _obstacle(layer: nn.Module, owners: Mapping[int, int]) -> str | None:
    weight = layer._parameters.get("weight")
    if isinstance(layer, LazyModuleMixin):
        return "lazy: its shape is not known yet"
    if not isinstance(weight, nn.Parameter) or weight.is_complex():
        return f"its weight is {'complex' if isinstance(weight, nn.Parameter) else 'parametrized'}"
    own = [*layer._modules, *layer._buffers, *(layer._parameters.keys() - {"weight", "bias"})]
    if own:  # which whoever put them there will look for
        return f"has parts of its own: {', '.join(own)}"
    if owners[id(weight)] > 1:
        return "its weight is tied to another module's"
    if type(layer) not in LAYER_TYPES and type(layer).forward not in {kind.forward for kind in LAYER_TYPES}:
        return f"a {type(layer).__name__} with a forward of its own"
    return None


@dataclass
class Trace:
    """Which layers ran on one batch, in which order, on inputs of which shape."""

    # name -> {spatial size: vectors in the batch}; plain containers, since callbacks store it in checkpoints
    calls: dict[str, dict[tuple[int, ...], int]] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict)
    odd: dict[str, str] = field(default_factory=dict)
    normed: list[str] = field(default_factory=list)  # layers whose output goes straight into batch norm
    batch: int = 1
    # what the whole model, or one of its children, was called with: a few inputs of the batch
    arguments: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def all_inputs(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Every layer's `LayerSpec.inputs` for one input of the network (for the whole batch, where some count does not
        divide)."""
        whole = all(n % self.batch == 0 for sizes in self.calls.values() for n in sizes.values())
        batch = self.batch if whole else 1
        return {name: tuple((n // batch, *size) for size, n in sizes.items()) for name, sizes in self.calls.items()}

    def inputs(self, name: str) -> tuple[tuple[int, ...], ...]:
        """Those of one layer; empty if it never ran."""
        return self.all_inputs().get(name, ())

    def under(self, name: str) -> Trace:
        """What was heard of one submodule, under its own names."""
        if not name:
            return self
        start = f"{name}."
        calls = {key.removeprefix(start): value for key, value in self.calls.items() if key.startswith(start)}
        samples = {key.removeprefix(start): value for key, value in self.samples.items() if key.startswith(start)}
        return Trace(calls=calls, samples=samples, batch=self.batch)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers, without the samples."""
        calls = [[name, [[*size, n] for size, n in sizes.items()]] for name, sizes in self.calls.items()]
        return {"calls": calls, "odd": dict(self.odd), "normed": list(self.normed), "batch": self.batch}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Trace:
        """The inverse of `state_dict`."""
        calls = {name: {tuple(size): n for *size, n in sizes} for name, sizes in state["calls"]}
        return cls(calls=calls, odd=dict(state["odd"]), normed=list(state["normed"]), batch=state["batch"])


class Recorder:
    """Listens to the layers of a model while its own code runs a batch; `stop()` gives the `Trace`.

    Compiled code runs eagerly meanwhile, since it would not call hooks, or would be compiled with them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._trace, self._stack = Trace(), ExitStack()
        self._outputs: dict[int, tuple[str, weakref.ref[Tensor]]] = {}
        self._inside: list[nn.Module] = []  # whose forward runs, innermost last
        self.read: set[str] = set()
        self._stack.enter_context(eager())
        for name, module in [("", model), *model.named_children()]:
            handle = module.register_forward_pre_hook(self._argument_listener(clean_name(name)))
            self._stack.callback(handle.remove)
        for name, layer in find_layers(model).items():
            handle = layer.register_forward_hook(self._listener(name), with_kwargs=True)
            self._stack.callback(handle.remove)
            layer._parameters = _Watched(layer._parameters, partial(self._shown, name, layer))
            self._stack.callback(_unwatch, layer)
        for module in model.modules():
            if module is not model or not hasattr(model, "training_step"):  # whose penalties may read weights
                self._stack.callback(module.register_forward_pre_hook(self._enter).remove)
                self._stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                self._stack.callback(module.register_forward_pre_hook(self._hear_norm).remove)

    def stop(self) -> Trace:
        self._stack.close()
        for name in self.read & self._trace.calls.keys():
            self._trace.odd[name] = READ
        return self._trace

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._inside.append(module)

    def _leave(self, *_: Any) -> None:
        self._inside.pop()

    def _shown(self, name: str, layer: nn.Module, weight: Tensor) -> Tensor:
        """The weight as others see it: a use of its values is heard, a question for its type or shape is none."""
        if not self._inside or self._inside[-1] is layer or isinstance(layer, LazyModuleMixin):
            return weight

        def read() -> Tensor:
            self.read.add(name)
            return weight

        return LazyWeight.of(weight, read)

    def _argument_listener(self, name: str) -> Callable[..., None]:
        def hear(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and all(isinstance(x, Tensor) and x.dim() for x in args):
                self._trace.arguments.setdefault(name, tuple(x[:SAMPLES].detach().clone() for x in args))

        return hear

    def _listener(self, name: str) -> Callable[..., None]:
        def hear(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
            if torch._C._current_graph_task_id() != -1:
                return  # a second forward inside backward: activation checkpointing
            x = args[0] if args else kwargs.get("input")
            if not isinstance(x, Tensor) or len(args) + len(kwargs) > 1:
                self._trace.odd[name] = "called with more than one argument"
            elif name not in self._trace.odd:
                self._hear(name, layer, x.detach())
                self._outputs[id(y)] = (name, weakref.ref(y))

        return hear

    def _hear_norm(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        name, output = self._outputs.get(id(args[0]) if args else 0, ("", None))
        if output is not None and output() is args[0] and name not in self._trace.normed:
            self._trace.normed.append(name)

    def _hear(self, name: str, layer: nn.Module, x: Tensor) -> None:
        axes = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)  # type: ignore[arg-type]
        batched = x.dim() > (axes + 1 if axes else 1)
        if not self._trace.calls:  # the first layer's input tells the batch size
            self._trace.batch = max(x.shape[0], 1) if batched else 1
        x = x.reshape(-1, *x.shape[-axes - 1 :])
        sizes = self._trace.calls.setdefault(name, {})
        size = tuple(x.shape[2:])
        sizes[size] = sizes.get(size, 0) + x.shape[0]
        if name not in self._trace.samples:
            self._trace.samples[name] = x[:SAMPLES].clone()


class _Watched(dict[str, Any]):
    """A module's parameters, of which `weight` is shown in another way."""

    def __init__(self, parameters: Mapping[str, Any], show: Callable[[Tensor], Tensor]) -> None:
        super().__init__(parameters)
        self.show = show

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        return self.show(value) if name == "weight" and isinstance(value, Tensor) else value


def _unwatch(layer: nn.Module) -> None:
    layer._parameters = dict(layer._parameters)


def eager() -> AbstractContextManager[None]:
    """Inside of it, compiled code runs as it was written."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def record(model: nn.Module, example_input: Any, training: bool = False) -> Trace:
    """The trace of a forward pass of a copy in evaluation mode, without gradient.

    With `training`, of a model in training mode another pass is heard in the modes that it is in, in which other layers
    may run or have their weights read; one that runs in one of both ways is heard in that. Raises what evaluation
    raised where neither runs.
    """
    traces, problems = [], []
    read: set[str] = set()
    for own in (False, True) if training and model.training else (False,):
        try:
            traces.append(_record(model, example_input, own, read))
        except Exception as error:  # batch norm, for instance, refuses a single input in training
            problems.append(error)
    if not traces:
        raise problems[0]
    trace = traces[0]
    for other in traces[1:]:
        trace.calls = other.calls | trace.calls
        trace.samples = other.samples | trace.samples
        trace.odd = other.odd | trace.odd
    for name in read & trace.calls.keys():
        trace.odd.setdefault(name, READ)
    return trace


def _record(model: nn.Module, example_input: Any, training: bool, read: set[str]) -> Trace:
    """One pass; adds the layers whose weight others read, whether they run themselves or not."""
    model = detached_copy(model)
    recorder = Recorder(model)
    try:
        run(model, example_input, training)
    finally:
        trace = recorder.stop()
    read |= recorder.read
    return trace


def run(model: nn.Module, example_input: Any, training: bool = False) -> Any:
    """`model(example_input)`, or `model(*example_input)` for a tuple, without changing its modes or the random state;
    in evaluation mode, or with `training` in the modes that it is in."""
    modes = {module: module.training for module in model.modules()}
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            return (model if training else model.eval())(*args)
    finally:
        for module, mode in modes.items():
            module.training = mode


def detached_copy(model: nn.Module, shared: tuple[Any, ...] = ()) -> nn.Module:
    """A deep copy without what `torch.compile` wrapped around modules and methods; objects in `shared` are not
    copied. Raises what an attribute that cannot be copied raises: see `uncopyable`."""
    memo = _memo(model, shared)
    for module in model.modules():
        inner = getattr(module, "_orig_mod", None)
        if isinstance(inner, nn.Module):
            memo[id(module)] = copy.deepcopy(inner, memo)
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        _drop_compiled_methods(module)
    return copied


def uncopyable(model: nn.Module, shared: tuple[Any, ...] = ()) -> dict[str, Any]:
    """The attributes that no copy of the model can have, such as locks, files and generators, by their dotted names.

    Tensors are not copied to find out.
    """
    memo = _memo(model, shared)
    memo |= {id(tensor): tensor for module in model.modules() for tensor in _tensors(vars(module))}
    memo |= {id(module): module for module in model.modules()}
    found = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:  # of any kind: what a class of somebody else does
                found[f"{clean_name(name)}.{attribute}".lstrip(".")] = value
    return found


def _memo(model: nn.Module, shared: tuple[Any, ...]) -> dict[int, Any]:
    """What deepcopy is to take for the copies of these objects."""
    memo: dict[int, Any] = {id(thing): thing for thing in shared}
    for module in model.modules():
        for tensor in _tensors(vars(module)):
            if not tensor.is_leaf:  # a loss kept as an attribute, say, which refuses to be copied
                memo.setdefault(id(tensor), tensor.detach().clone())
    return memo


def _drop_compiled_methods(module: nn.Module) -> None:
    """Lightning sets compiled methods, closures over the original, on a module that was compiled as a whole."""
    own = vars(module)
    if own.get("_compiler_ctx") is not None:
        for key in own["_compiler_ctx"]:
            own.pop(key.removeprefix("original_"), None)
        own["_compiler_ctx"] = None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def replace_layers(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put new modules in place of old ones wherever they occur; returns the model, or what replaces it.

    A new module gets the old one's hooks and plain attributes, such as `stride`, which the model's code may read.
    """
    for old, new in replacements.items():
        _take_over(old, new)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    _leave_fast_paths(model, set(replacements.values()))
    return replacements.get(model, model)


def _take_over(old: nn.Module, new: nn.Module) -> None:
    for key, value in vars(old).items():
        if key in _HOOKS:
            vars(new)[key] = value
        elif not key.startswith("_"):
            vars(new).setdefault(key, value)


def without_hooks(layer: nn.Module) -> nn.Module:
    """The same layer, the same tensors, without anything that others hung on to its call."""
    bare = copy.copy(layer)
    vars(bare).update({key: OrderedDict() for key in _HOOKS if isinstance(vars(layer).get(key), OrderedDict)})
    return bare


# what PyTorch keeps about hooks on calls: see `nn.Module.__init__`
_HOOKS = frozenset(
    f"_{kind}{detail}"
    for kind in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    for detail in ("", "_with_kwargs", "_always_called")
) | {"_is_full_backward_hook"}


def _leave_fast_paths(model: nn.Module, replaced: set[nn.Module]) -> None:
    """PyTorch's transformer encoders have, for evaluation, a way past their linear layers' forward, straight to the
    weights; by these attributes they tell when not to take it."""
    for module in model.modules():
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)) and replaced & set(module.modules()):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
            else:
                module.activation_relu_or_gelu = 0


def num_parameters(model: nn.Module) -> int:
    """All parameters, tied ones once."""
    return sum(math.prod(p.shape) for p in model.parameters())


def is_same_computation(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks are the same modules on tensors of the same shapes, so that they take the same time."""

    def outline(model: nn.Module) -> list[Any]:
        modules = [(name, type(module), module.extra_repr()) for name, module in model.named_modules()]
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return [modules, [(name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in tensors]]

    return outline(a) == outline(b)
