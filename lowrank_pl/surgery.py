"""The only place that touches a module tree: find layers, listen to one batch, copy, replace."""

from __future__ import annotations

import copy
import math
import sys
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from inspect import ismethod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import LAYER_TYPES, FactorChain, LazyWeight, spec_of

T = TypeVar("T")

READ = "its weight is read by another module, too"
SAMPLES = 2  # inputs kept per layer, to verify the extracted layer on
NEVER_BUT_READ = "never called: another module reads its weight"


def clean_name(name: str) -> str:
    """A module's dotted name without what `torch.compile` adds."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def under(part: str, named: Mapping[str, T]) -> dict[str, T]:
    """What belongs to a part, under the part's own names."""
    inside = {name: value for name, value in named.items() if not part or f"{name}.".startswith(f"{part}.")}
    return {name[len(part) :].lstrip("."): value for name, value in inside.items()}


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


@dataclass(frozen=True)
class Call:
    """What a module was called with, and how many inputs that holds, where it is known."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    batch: int | None = None

    @classmethod
    def of(cls, example_input: Any) -> Call:
        """A tuple of arguments, or the only argument; a call, with its keywords, is one already."""
        if isinstance(example_input, Call):
            return example_input
        return cls(example_input if isinstance(example_input, tuple) else (example_input,))


@dataclass
class Trace:
    """Which layers ran on one batch or several, in which order, on inputs of which shape."""

    # name -> {spatial size: vectors in all batches}; plain containers, since callbacks store it in checkpoints. What
    # ran once for a whole batch (on a table of relative positions, say) counts as if once for every input.
    calls: dict[str, dict[tuple[int, ...], int]] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict)
    odd: dict[str, str] = field(default_factory=dict)
    normed: list[str] = field(default_factory=list)  # layers whose output goes straight into batch norm
    batch: int = 1  # inputs of the network in all batches
    batches: int = 1
    # layer -> the module that `training_step` called with data, in which or behind which it ran
    networks: dict[str, str] = field(default_factory=dict)
    # of these modules: multiply-adds outside of all layers, in all batches; None where nobody counted (before 0.2)
    rest: dict[str, int] | None = field(default_factory=dict)
    called: list[str] = field(default_factory=list)  # what `training_step` itself called
    # what that, the whole model and its children were called with: a few of the inputs
    arguments: dict[str, Call] = field(default_factory=dict)

    def on(self, name: str, spec: LayerSpec) -> LayerSpec:
        """A layer with its `inputs` and its `share`, as it ran on average for one input of the network."""
        sizes = self.calls.get(name)
        if not sizes:
            return spec
        inputs = tuple((-(-n // self.batch), *size) for size, n in sizes.items())
        average = sum(n * math.prod(size) for size, n in sizes.items()) / self.batch
        return spec.with_(inputs=inputs, share=average / sum(math.prod(each) for each in inputs))

    def inputs(self, name: str) -> tuple[tuple[int, ...], ...]:
        """Its `inputs`; empty if it never ran."""
        return self.on(name, LayerSpec("linear", 0, 0)).inputs

    def rest_macs(self, names: Collection[str]) -> float:
        """Multiply-adds for one input, in the networks of these layers, that are in no layer at all."""
        networks = {self.networks.get(name, "") for name in names}
        return sum((self.rest or {}).get(network, 0) for network in networks) / self.batch

    def add(self, other: Trace) -> None:
        """What was heard of further batches."""
        for name, sizes in other.calls.items():
            mine = self.calls.setdefault(name, {})
            for size, n in sizes.items():
                mine[size] = mine.get(size, 0) + n
        for name, network in other.networks.items():
            join(self.networks, name, network)
        if self.rest is not None:
            for network, macs in (other.rest or {}).items():
                self.rest[network] = self.rest.get(network, 0) + macs
        self.batch, self.batches = self.batch + other.batch, self.batches + other.batches
        self.odd |= other.odd
        self.normed += [name for name in other.normed if name not in self.normed]
        self.called += [name for name in other.called if name not in self.called]
        self.samples = other.samples | self.samples
        self.arguments = other.arguments | self.arguments

    def hear_reads(self, names: Collection[str]) -> None:
        """Other modules have read the weights of these layers."""
        self.odd |= {name: READ if name in self.calls else NEVER_BUT_READ for name in names}

    def under(self, name: str) -> Trace:
        """What was heard of one submodule, under its own names."""
        if not name:
            return self
        return Trace(
            calls=under(name, self.calls),
            samples=under(name, self.samples),
            batch=self.batch,
            batches=self.batches,
            rest=None if self.rest is None else under(name, self.rest),
            called=list(under(name, dict.fromkeys(self.called))),
            arguments=under(name, self.arguments),
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain containers, without the samples."""
        calls = [[name, [[*size, n] for size, n in sizes.items()]] for name, sizes in self.calls.items()]
        counts = {"batch": self.batch, "batches": self.batches, "rest": None if self.rest is None else dict(self.rest)}
        networks = dict(self.networks)
        return {"calls": calls, "odd": dict(self.odd), "normed": list(self.normed), "networks": networks, **counts}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Trace:
        """The inverse of `state_dict`, for those of 0.1 and 0.2 too."""
        calls = {name: {tuple(size): n for *size, n in sizes} for name, sizes in state["calls"]}
        found = cls(calls=calls, odd=dict(state["odd"]), normed=list(state["normed"]), batch=state["batch"])
        if "batches" not in state:
            found.rest = None
            if any(n % found.batch for sizes in calls.values() for n in sizes.values()):
                found.batch = 1  # costs were those of a whole batch then, and a run goes on with them
            return found
        found.batches, found.rest, found.networks = state["batches"], state["rest"], dict(state["networks"])
        return found


def join(networks: dict[str, str], layer: str, network: str) -> None:
    """A layer ran in, or behind, a network. It belongs to the innermost one that holds it, else to the first one behind
    which it ran: a discriminator's are its own, also where it ran on what a generator had made first."""

    def depth(name: str) -> int:
        return len(name) if not name or layer == name or layer.startswith(f"{name}.") else -1

    if layer not in networks or depth(network) > depth(networks[layer]):
        networks[layer] = network


def count_inputs(batch: Any, given: int | None = None) -> int:
    """How many inputs of the network a batch holds: the leading size of its tensors, unless it is given.

    Raises `ValueError` where they differ, or where there are none.
    """
    given = batch.batch if isinstance(batch, Call) else given
    if given is not None:
        return given
    sizes = sorted({x.shape[0] for x in _leaves(batch) if isinstance(x, Tensor) and x.dim()})
    if len(sizes) != 1 or sizes[0] == 0:
        which = f"have the leading sizes {', '.join(map(str, sizes[:6]))}" if sizes else "are missing"
        raise ValueError(
            f"Expected a batch whose size can be told, but its tensors {which}: give `batch_size`, the number of inputs"
        )
    return sizes[0]


def _leaves(value: Any) -> Iterator[Any]:
    """What containers hold: also dataclasses and mappings such as Hugging Face's, which PyTorch's trees do not know."""
    if isinstance(value, Call):
        value = (value.args, value.kwargs)
    if is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


_PLAIN = (Tensor, bool, int, float, str, type(None), torch.dtype, torch.device)


def _few(call: Call, batch: int) -> Call | None:
    """A copy of a call with a few of the batch's inputs; None where it holds what cannot be copied, or no tensor of the
    batch's size: frames that are folded into the batch, say, of which nobody can tell which belong to an input."""
    leaves = list(_leaves(call))
    if not all(isinstance(x, _PLAIN) for x in leaves):
        return None
    if not any(isinstance(x, Tensor) and batch in x.shape[:2] for x in leaves):
        return None
    return with_inputs(call, batch, min(SAMPLES, batch))


def with_inputs(call: Call, batch: int, count: int) -> Call:
    """A copy of a call on a batch of so many inputs, with `count` of them, repeated as needed. A tensor holds inputs
    along its first axis or, sequence first, its second, if that has the batch's size; else it is the same for all."""

    def resized(x: Tensor) -> Tensor:
        axes = [axis for axis, n in enumerate(x.shape[:2]) if n == batch]
        places = torch.arange(count, device=x.device) % batch
        return x.detach().index_select(axes[0], places) if axes else x.detach().clone()

    args, kwargs = tree_map_only(Tensor, resized, (call.args, dict(call.kwargs)))
    return Call(args, kwargs, count)


def _count_lstm(x: Tensor, input_weight: Tensor, hidden_weight: Tensor, *_: Any, **__: Any) -> int:
    """FLOPs of one direction of one layer: every vector meets both matrices."""
    return 2 * x.shape[:-1].numel() * (input_weight.numel() + hidden_weight.numel())


# a fused operation of CPUs, of which PyTorch's counter knows nothing
_count_lstm._get_raw = True  # type: ignore[attr-defined]  # FlopCounterMode: tensors, not shapes
FUSED = {torch.ops.aten.mkldnn_rnn_layer: _count_lstm}


class _Counter(TorchDispatchMode):
    """Counts multiply-adds as `FlopCounterMode` does, but leaves gradients and module hooks alone."""

    def __init__(self, hear: Callable[[int], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.hear = hear

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in FUSED:
            self.hear(FUSED[packet](*args, **kwargs) // 2)
        elif packet in flop_registry:
            self.hear(flop_registry[packet](*args, **kwargs, out_val=out) // 2)
        return out


class Recorder:
    """Listens to the layers of a model while its own code runs a batch of so many inputs; `stop()` gives the `Trace`.

    Compiled code runs eagerly meanwhile, since it would not call hooks, or would be compiled with them.
    """

    def __init__(self, model: nn.Module, batch: int = 1) -> None:
        self._trace, self._stack, self._model = Trace(batch=batch), ExitStack(), model
        self._names = {module: clean_name(name) for name, module in model.named_modules()}
        self._outputs: dict[int, tuple[str, weakref.ref[Tensor]]] = {}
        self._inside: list[nn.Module | None] = []  # whose forward runs, innermost last
        self._network = ""
        self.read: set[str] = set()
        self._alone: dict[tuple[str, tuple[int, ...]], list[int]] = {}  # calls on one vector or one table
        self._of_shapes: dict[str, int] = {}  # multiply-adds by the shapes of a layer's inputs ...
        self._counted: dict[tuple[str, str], int] = {}  # ... and as counted, by network and innermost module
        self._counting = ExitStack()
        self._stack.enter_context(eager())
        for name, layer in find_layers(model).items():
            handle = layer.register_forward_hook(self._listener(name), with_kwargs=True)
            self._stack.callback(handle.remove)
            layer._parameters = _Watched(layer._parameters, partial(self._shown, name, layer))
            self._stack.callback(_unwatch, layer)
        for module in model.modules():
            self._stack.callback(module.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
            self._stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                self._stack.callback(module.register_forward_pre_hook(self._hear_norm).remove)

    def close(self) -> None:
        """Listen no more, and leave nothing behind on the model."""
        self._counting.close()
        self._stack.close()

    def stop(self) -> Trace:
        """What was heard."""
        self.close()
        trace = self._trace
        for (name, size), (calls, vectors) in self._alone.items():
            sizes = trace.calls[name]
            # as many calls as inputs: a loop over them
            sizes[size] = sizes.get(size, 0) + vectors * (1 if calls % trace.batch == 0 else trace.batch)
        trace.hear_reads(self.read)
        assert trace.rest is not None
        for (network, name), macs in self._counted.items():
            if name not in self._of_shapes:
                owner = {name: network}
                for other in set(trace.networks.values()):
                    join(owner, name, other)
                trace.rest[owner[name]] = trace.rest.get(owner[name], 0) + macs
        self._compare()
        return trace

    def _compare(self) -> None:
        """Warn where the layers' shapes give other multiply-adds than PyTorch's counter has seen in them."""
        counted: Counter[str] = Counter()
        for (_, name), macs in self._counted.items():
            counted[name] += macs
        for name, macs in self._of_shapes.items():
            if name not in self._trace.odd and abs(counted[name] - macs) > 0.01 * macs:
                warnings.warn(
                    f"Layer {name!r}: {macs:,} multiply-adds by the shapes of its inputs, but PyTorch counted "
                    f"{counted[name]:,} in it: budgets and reports of MACs may be wrong",
                    stacklevel=2,
                )
                return

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is self._model and hasattr(module, "training_step") and not ismethod(module.forward):
            # a strategy such as DDP runs `training_step` in place of forward: losses and penalties are not the network
            self._inside.append(None)
            return
        name, call = self._names[module], Call(args, kwargs)
        outermost = not self._is_inside()
        if outermost and not _in_backward():
            self._open(module, name, call)
        wanted = (outermost or "." not in name) and not isinstance(module, LAYER_TYPES)
        if wanted and name not in self._trace.arguments:
            few = _few(call, self._trace.batch)
            if few is not None:
                self._trace.arguments[name] = few
        self._inside.append(module)

    def _open(self, module: nn.Module, name: str, call: Call) -> None:
        """`training_step` calls a module: a network of its own, unless it goes on with what another has computed."""
        follows = any(isinstance(x, Tensor) and x.grad_fn is not None for x in _leaves(call))
        if not follows and not isinstance(module, LAYER_TYPES):
            self._network = name
        if name not in self._trace.called:
            self._trace.called.append(name)
        self._counting.enter_context(_Counter(self._hear_macs))

    def _leave(self, *_: Any) -> None:
        self._inside.pop()
        if not self._is_inside():
            self._counting.close()

    def _is_inside(self) -> bool:
        return any(module is not None for module in self._inside)

    def _hear_macs(self, macs: int) -> None:
        module = self._inside[-1]
        if module is not None:
            key = (self._network, self._names[module])
            self._counted[key] = self._counted.get(key, 0) + macs

    def _shown(self, name: str, layer: nn.Module, weight: Tensor) -> Tensor:
        """The weight as others see it: a use of its values is heard, a question for its type or shape is none."""
        if not self._inside or self._inside[-1] in (layer, None) or isinstance(layer, LazyModuleMixin):
            return weight

        def read() -> Tensor:
            self.read.add(name)
            return weight

        return LazyWeight.of(weight, read)

    def _listener(self, name: str) -> Callable[..., None]:
        def hear(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
            if _in_backward():
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
        alone = self._trace.batch > 1 and (not batched or x.shape[0] == 1)
        x = x.reshape(-1, *x.shape[-axes - 1 :])
        sizes, size = self._trace.calls.setdefault(name, {}), tuple(x.shape[2:])
        if alone:
            heard = self._alone.setdefault((name, size), [0, 0])
            heard[0], heard[1] = heard[0] + 1, heard[1] + x.shape[0]
        else:
            sizes[size] = sizes.get(size, 0) + x.shape[0]
        join(self._trace.networks, name, self._network)
        macs = spec_of(layer).with_(inputs=((x.shape[0], *size),)).macs or 0
        self._of_shapes[name] = self._of_shapes.get(name, 0) + macs
        if name not in self._trace.samples:
            self._trace.samples[name] = x[:SAMPLES].clone()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


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


def record(model: nn.Module, example_input: Any, batch_size: int | None = None, training: bool = False) -> Trace:
    """The trace of a forward pass of a copy in evaluation mode, without gradient.

    With `training`, of a model in training mode another pass is heard in the modes that it is in, in which other layers
    may run or have their weights read; one that runs in one of both ways is heard in that. Raises what evaluation
    raised where neither runs, and `ValueError` where it cannot be told how many inputs `example_input` holds.
    """
    batch = count_inputs(example_input, batch_size)
    traces, problems = [], []
    read: set[str] = set()
    for own in (False, True) if training and model.training else (False,):
        try:
            traces.append(_record(model, example_input, batch, own, read))
        except Exception as error:  # batch norm, for instance, refuses a single input in training
            problems.append(error)
    if not traces:
        raise problems[0]
    trace = traces[0]
    for other in traces[1:]:
        trace.calls = other.calls | trace.calls
        trace.samples = other.samples | trace.samples
        trace.networks = other.networks | trace.networks
        trace.odd = other.odd | trace.odd
    trace.hear_reads(read)
    return trace


def _record(model: nn.Module, example_input: Any, batch: int, training: bool, read: set[str]) -> Trace:
    """One pass; adds the layers whose weight others read, whether they run themselves or not."""
    model = detached_copy(model)
    recorder = Recorder(model, batch)
    try:
        run(model, example_input, training)
    finally:
        recorder.close()
    read |= recorder.read
    return recorder.stop()


def run(model: nn.Module, example_input: Any, training: bool = False) -> Any:
    """The model on its argument, a tuple of arguments or a `Call`, without changing its modes or the random state; in
    evaluation mode, or with `training` in the modes that it is in."""
    modes, call = {module: module.training for module in model.modules()}, Call.of(example_input)
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            return (model if training else model.eval())(*call.args, **call.kwargs)
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
