"""Listens to a network while its own code runs."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from inspect import ismethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from lowrank_pl.adapters import LinearMap, find_maps
from lowrank_pl.layers import LAYER_TYPES, LazyWeight, Source, spec_of
from lowrank_pl.names import clean_name
from lowrank_pl.tracing.calls import SAMPLES, Call, few, leaves
from lowrank_pl.tracing.counter import MultiplyAdds
from lowrank_pl.tracing.trace import Trace, join


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
        self._of_shapes: dict[str, int] = {}  # multiply-adds by the shapes of a map's inputs ...
        # ... the same and what was counted, by network and innermost module
        self._explained: dict[tuple[str, str], int] = {}
        self._counted: dict[tuple[str, str], int] = {}
        self._counting = ExitStack()
        self._stack.enter_context(eager())
        self._stack.enter_context(slow_paths())
        owners: dict[nn.Module, dict[str, LinearMap]] = {}
        for each in find_maps(model).values():
            owners.setdefault(each.module, {})[each.key] = each
        for owner, maps in owners.items():
            handle = owner.register_forward_hook(self._listener(maps), with_kwargs=True)
            self._stack.callback(handle.remove)
            watched: dict[str, list[LinearMap]] = {}
            for key, each in maps.items():
                if each.adapter.shown_by_running or each.adapter.hides_parameters or not key:
                    watched.setdefault(key.partition(".")[0] or "weight", []).append(each)
            if watched:
                owner._parameters = _Watched(owner._parameters, partial(self._shown, watched))
                self._stack.callback(_unwatch, owner)
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
            left = macs - self._explained.get((network, name), 0)
            if name not in self._of_shapes and left > 0:
                owner = {name: network}
                for other in set(trace.networks.values()):
                    join(owner, name, other)
                trace.rest[owner[name]] = trace.rest.get(owner[name], 0) + left
        self._compare()
        return trace

    def _compare(self) -> None:
        """Warn where the layers' shapes give other multiply-adds than PyTorch's counter has seen in them."""
        counted: Counter[str] = Counter()
        explained: Counter[str] = Counter()
        for found, of in ((counted, self._counted), (explained, self._explained)):
            for (_, name), macs in of.items():
                found[name] += macs
        for name, macs in explained.items():
            more = counted[name] - macs  # a layer does nothing else, attention does
            wrong = abs(more) if name in self._of_shapes else -more
            if name not in self._trace.odd and wrong > 0.01 * macs:
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
            kept = few(call, self._trace.batch)
            if kept is not None:
                self._trace.arguments[name] = kept
        self._inside.append(module)

    def _open(self, module: nn.Module, name: str, call: Call) -> None:
        """`training_step` calls a module: a network of its own, unless it goes on with what another has computed."""
        follows = any(isinstance(x, Tensor) and x.grad_fn is not None for x in leaves(call))
        if not follows and not isinstance(module, LAYER_TYPES):
            self._network = name
        if name not in self._trace.called:
            self._trace.called.append(name)
        self._counting.enter_context(MultiplyAdds(self._hear_macs))

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

    def _shown(self, watched: Mapping[str, list[LinearMap]], key: str, weight: Tensor) -> Tensor:
        """The weight as others see it: what it is multiplied by is heard, another use of its values too, a question for
        its type or shape is none."""
        maps, reader = watched.get(key), self._inside[-1] if self._inside else None
        if maps is None or reader is None or isinstance(maps[0].module, LazyModuleMixin):
            return weight
        if (maps[0].is_layer or maps[0].adapter.hides_parameters) and reader is maps[0].module:
            return weight
        if maps[0].adapter.hides_parameters:
            self.read |= {each.name for others in watched.values() for each in others}
            return weight
        return LazyWeight.of(weight, _Heard(self, maps, weight))

    def _listener(self, maps: dict[str, LinearMap]) -> Callable[..., None]:
        adapter, owner = next((each.adapter, each.module) for each in maps.values())

        def hear(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
            if _in_backward():
                return  # a second forward inside backward: activation checkpointing
            inputs = {} if adapter.shown_by_running else adapter.inputs(owner, args, kwargs)
            for key, each in maps.items():
                if inputs is None:
                    self._trace.odd[each.name] = "called with more than one argument"
                elif each.name not in self._trace.odd and key in inputs:
                    self._hear(each, inputs[key].detach(), self._names[owner])
                elif not each.adapter.shown_by_running:  # it has run, but multiplies nothing
                    self._trace.calls.setdefault(each.name, {})
            if "" in maps and isinstance(y, Tensor):
                self._outputs[id(y)] = (maps[""].name, weakref.ref(y))

        return hear

    def _hear_norm(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        name, output = self._outputs.get(id(args[0]) if args else 0, ("", None))
        if output is not None and output() is args[0] and name not in self._trace.normed:
            self._trace.normed.append(name)

    def _hear(self, heard: LinearMap, x: Tensor, where: str) -> None:
        # lazy ones know their shape now
        spec = spec_of(heard.module) if isinstance(heard.module, LAYER_TYPES) else heard.layer
        name, axes = heard.name, len(spec.kernel)
        batched = x.dim() > (axes + 1 if axes else 1)
        alone = heard.is_layer and self._trace.batch > 1 and (not batched or x.shape[0] == 1)
        x = x.reshape(-1, *x.shape[-axes - 1 :])
        sizes, size = self._trace.calls.setdefault(name, {}), tuple(x.shape[2:])
        if alone:
            counts = self._alone.setdefault((name, size), [0, 0])
            counts[0], counts[1] = counts[0] + 1, counts[1] + x.shape[0]
        else:
            sizes[size] = sizes.get(size, 0) + x.shape[0]
        join(self._trace.networks, name, self._network)
        self._explain(where, name, spec.with_(inputs=((x.shape[0], *size),)).macs or 0)
        if name not in self._trace.samples:
            self._trace.samples[name] = x[:SAMPLES].clone()

    def hear_product(self, heard: LinearMap, macs: float) -> None:
        """Some module has multiplied by a part of a weight, or by all of it in another way than its layer does."""
        sizes = self._trace.calls.setdefault(heard.name, {})
        sizes[()] = sizes.get((), 0) + macs / heard.layer.num_weights
        join(self._trace.networks, heard.name, self._network)
        self._explain(self._reader, heard.name, round(macs))

    def hear_layer(self, heard: LinearMap, x: Tensor) -> None:
        """Some module has applied the weight of a layer as the layer itself would have done."""
        self._hear(heard, x.detach(), self._reader)

    @property
    def _reader(self) -> str:
        reader = self._inside[-1]
        return "" if reader is None else self._names[reader]

    def _explain(self, where: str, name: str, macs: int) -> None:
        """So many of the multiply-adds that were counted in a module are those of a linear map."""
        self._of_shapes[name] = self._of_shapes.get(name, 0) + macs
        key = (self._network, where)
        self._explained[key] = self._explained.get(key, 0) + macs


class _Heard(Source):
    """A weight that others read, of one map or of a batch of them: products with it are heard, other uses make its
    layer one that is read."""

    def __init__(self, recorder: Recorder, maps: list[LinearMap], weight: Tensor) -> None:
        self.recorder, self.maps, self.weight = recorder, maps, weight

    def dense(self) -> Tensor:
        self.recorder.read |= {each.name for each in self.maps}
        return self.weight

    def multiply(self, x: Tensor, rows: tuple[Any, ...], transposed: bool, product: Callable[..., Tensor]) -> Any:
        first = self.maps[0]
        if first.layer.kind != "linear" or not first.adapter.shows_weight:
            return None
        part = self.weight
        for index in rows:
            part = part[index]
        y = product(x, part.mT if transposed else part)
        if first.is_layer and not rows and not transposed:
            self.recorder.hear_layer(first, x)
            return y
        macs = y.numel() * x.shape[-1]
        for each, share in zip(self.maps, self._shares(rows), strict=True):
            if share:
                self.recorder.hear_product(each, macs * share)
        return y

    def _shares(self, rows: tuple[Any, ...]) -> list[float]:
        """Of a product with some of a batch of maps, which are chosen first; of all of them the same."""
        count = len(self.maps)
        chosen = torch.arange(count)
        if count > 1 and rows:
            chosen = chosen[rows[0].cpu() if isinstance(rows[0], Tensor) else rows[0]].reshape(-1)
        shares: list[float] = (torch.bincount(chosen, minlength=count) / len(chosen)).tolist()
        return shares


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class _Watched(dict[str, Any]):
    """A module's parameters, some of which are shown in another way."""

    def __init__(self, parameters: Mapping[str, Any], show: Callable[[str, Tensor], Tensor]) -> None:
        super().__init__(parameters)
        self.show = show

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        return self.show(name, value) if isinstance(value, Tensor) else value


@contextmanager
def slow_paths() -> Iterator[None]:
    """PyTorch's fused operations for whole layers of transformers call none of their modules."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _unwatch(layer: nn.Module) -> None:
    layer._parameters = dict(layer._parameters)


def eager() -> AbstractContextManager[None]:
    """Inside of it, compiled code runs as it was written."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance
