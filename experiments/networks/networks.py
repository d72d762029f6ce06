"""Every network of the catalogue through DeepTwist, learning-compression and `compress`; a table of what came out.

    python experiments/networks/networks.py                # what is missing, then the table
    python experiments/networks/networks.py --only BERT    # again, those of this name or library

Results are lines of JSON in `runs/networks/`; a network whose process crashes or hangs is one of them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from catalogue import Batch, Network, networks
from table import write_table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from lowrank_pl import (
    Call,
    CostBudget,
    DeepTwist,
    ExtractStructure,
    LearningCompression,
    Targets,
    compress,
    load_compressed,
    make_plan,
    save_compressed,
    summarize,
)
from lowrank_pl.adapters import LinearMap, find_maps
from lowrank_pl.callbacks import CompressionCallback
from lowrank_pl.extraction import RECORD
from lowrank_pl.report import summarize_layers
from lowrank_pl.surgery import num_parameters
from lowrank_pl.tracing import FUSED, Trace, record

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "runs" / "networks"
SECONDS = 150  # for one network
BATCHES = (1, 2, 8, 32)
RATIOS = (0.5, 0.75, 0.9)  # budgets, as shares of the multiply-adds
MU0 = 1e-2
TOLD = re.compile("multiply-adds by the shapes|not the projected|not measured|example was taken|cannot be copied")
TABLES = re.compile(r"embed|position|pos_|cls_token|dist_token|relative|rel_pos|latents|bias_table|query_tokens")


class Training(pl.LightningModule):
    """Any network, trained to put out ones."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, _: int) -> Tensor:
        outputs = self.net(**batch) if isinstance(batch, dict) else self.net(*batch)
        return torch.stack([(y - 1).abs().square().mean() for y in floating(outputs) if y.requires_grad]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-4)


def floating(outputs: Any) -> list[Tensor]:
    leaves = [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]
    return [x for x in leaves if x.is_floating_point() or x.is_complex()]


def build(network: Network, seed: int) -> nn.Module:
    """With random numbers also where a network begins with matrices of zeros, so that its output depends on all."""
    torch.manual_seed(seed)
    net = network.make()
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() >= 2 and not p.any():
                p.normal_(0, 0.05)
    return net


def batch_of(network: Network, n: int) -> Batch:
    torch.manual_seed(0)
    return network.batch(n)


def call_of(network: Network, n: int) -> Call:
    batch, told = batch_of(network, n), n if network.tell_batch else None
    return Call(kwargs=batch, batch=told) if isinstance(batch, dict) else Call(tuple(batch), batch=told)


@torch.no_grad()
def outputs_of(net: nn.Module, call: Call) -> list[Tensor]:
    torch.manual_seed(0)
    return floating(net.eval()(*call.args, **call.kwargs))


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Of their norm; infinite where shapes differ."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        return float("inf")
    pairs = [(a[b.isfinite()], b[b.isfinite()]) for a, b in zip(found, expected, strict=True)]
    error = sum(float((a - b).abs().square().sum()) for a, b in pairs) ** 0.5
    scale = sum(float(b.abs().square().sum()) for _, b in pairs) ** 0.5
    return error / max(scale, 1e-30)


# -- the methods ---------------------------------------------------------------------------------------------------


def check(network: Network, projected: nn.Module, extracted: nn.Module, folder: Path) -> dict[str, Any]:
    """What was saved, against what is in memory."""
    loaded = load_compressed(build(network, seed=1), folder)
    call = call_of(network, 2)
    expected = outputs_of(extracted, call)
    return {
        "compressed": len(getattr(extracted, RECORD)["layers"]),
        "loaded": difference(outputs_of(loaded, call), expected),
        "difference": difference(expected, outputs_of(projected, call)),
    }


def fit(network: Network, callback: CompressionCallback, folder: Path) -> tuple[nn.Module, nn.Module]:
    """The projected network and the extracted one, which is saved in the folder."""
    module = Training(build(network, seed=0))
    extract = ExtractStructure(folder, submodule="net", latency=False)
    trainer = pl.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback, extract],
    )  # fmt: skip
    trainer.fit(module, DataLoader([batch_of(network, 2)] * 4, batch_size=None))  # type: ignore[arg-type]
    assert extract.extracted is not None
    return module.net, extract.extracted


def deeptwist(network: Network, folder: Path) -> dict[str, Any]:
    callback = DeepTwist(S_D=2, batch_size=2 if network.tell_batch else None)
    projected, extracted = fit(network, callback, folder)
    return check(network, projected, extracted, folder) | shares(network, projected, extracted)


def learning_compression(network: Network, folder: Path, ratio: float | None, lambda_: float) -> dict[str, Any]:
    asked: dict[str, Any] = {"lambda_": lambda_} if ratio is None else {"budget": CostBudget("macs", ratio)}
    told = 2 if network.tell_batch else None
    targets = Targets(exclude=network.frozen)
    callback = LearningCompression(
        mu0=MU0, growth=2.0, steps=3, l_step_steps=1, batch_size=told, targets=targets, **asked
    )
    return check(network, *fit(network, callback, folder), folder) | {"ratio": ratio}


def by_compress(network: Network, folder: Path) -> dict[str, Any]:
    net, call = build(network, seed=0), call_of(network, 2)
    small = compress(net, example_input=call, batch_size=call.batch)
    save_compressed(small, folder)
    projected = build(network, seed=0)
    with torch.no_grad():
        for name in getattr(small, RECORD)["layers"]:  # what stands in place of a layer shows the weight it stands for
            stands = small.get_submodule(name)
            weight = getattr(stands, "factors", stands).weight.clone()  # type: ignore[operator]
            find_maps(projected)[name].write_(weight)
    return check(network, projected, small, folder)


# -- shares --------------------------------------------------------------------------------------------------------


def shares(network: Network, dense: nn.Module, extracted: nn.Module) -> dict[str, Any]:
    """Which share of the weights, and of the multiply-adds, lies in layers that were compressed; and what does not.

    Weights are parameters with at least two axes longer than 1; tables are embeddings, positions and tokens.
    """
    done, notes = (getattr(extracted, RECORD)[key] for key in ("layers", "notes"))
    weights: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    known, seen = set(), set()
    for name, each in find_maps(dense).items():
        known |= {id(p) for p in each.parameters}
        place = (id(each.parameters[0]), each.key)
        if place in seen:  # tied ones once
            continue
        seen.add(place)
        kind = "tables" if is_table(each) else "compressed" if name in done else "dense"
        weights[kind] += each.layer.num_weights
        if kind == "dense":
            reasons[notes.get(name) or "no reason given"] += each.layer.num_weights
    for name, p in dense.named_parameters():
        if sum(n > 1 for n in p.shape) >= 2 and id(p) not in known:
            owner, _, leaf = name.rpartition(".")
            weights["dense"] += p.numel()
            reasons[f"no adapter: {type(dense.get_submodule(owner)).__name__}.{leaf}"] += p.numel()
    call = call_of(network, 2)
    report = summarize_layers(dense, extracted, record(dense, call, call.batch), latency=False)
    macs = sum(layer.dense.macs or 0 for layer in report.layers if layer.name in done)
    matrices = max(weights["compressed"] + weights["dense"], 1)
    return {
        "share": weights["compressed"] / matrices,
        "share_with_embeddings": weights["compressed"] / max(weights.total(), 1),
        "share_of_macs": macs / max(report.dense.macs or 0, 1),
        "dense": {reason: n / matrices for reason, n in reasons.most_common() if n},
    }


def is_table(each: LinearMap) -> bool:
    """An embedding, or positions and tokens that are added, not multiplied by."""
    is_embedding = isinstance(each.module, (nn.Embedding, nn.EmbeddingBag))
    return is_embedding or (each.adapter.shown_by_running and TABLES.search(each.name) is not None)


# -- costs ---------------------------------------------------------------------------------------------------------


def counted(net: nn.Module, call: Call) -> int:
    """Multiply-adds by PyTorch's own counter, of operations that it knows."""
    torch.manual_seed(0)
    net = net.eval().requires_grad_(False)
    torch.backends.mha.set_fastpath_enabled(False)
    with (
        torch.backends.mkldnn.flags(enabled=False),  # whose recurrent networks are one operation that it does not know
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=FUSED) as counter,
    ):
        net(*call.args, **call.kwargs)
    return int(counter.get_total_flops()) // 2


def costs(network: Network) -> dict[str, Any]:
    """At several batch sizes: multiply-adds for one input by PyTorch's counter, by the report, and by layers' shapes
    and what is in no layer; and the ranks that a budget gives."""
    found: dict[str, Any] = {"counted": {}, "reported": {}, "by_layers": {}, "ranks": {}, "errors": {}, "ratio": None}
    for n in BATCHES:
        try:
            net, call = build(network, seed=0).train(), call_of(network, n)
            found["counted"][n] = counted(build(network, seed=0), call) / n
            trace = record(net, call, call.batch, training=True)
            found["by_layers"][n] = summarize_layers(net, net, trace, latency=False).dense.macs
            found["lambda"] = _some_lambda(network, net, trace)
            for ratio in RATIOS if found["ratio"] is None else [found["ratio"]]:
                try:
                    targets = Targets(exclude=network.frozen)
                    choices = make_plan(net, "svd", CostBudget("macs", ratio), targets, trace).choose_ranks()
                    found["ratio"], found["ranks"][n] = ratio, {name: list(c.rank) for name, c in choices.items()}
                    break
                except ValueError as error:
                    found["no_budget"] = str(error)
            found["reported"][n] = summarize(net, net, call, latency=False, batch_size=call.batch).dense.macs
        except Exception as error:
            traceback.print_exc()
            found["errors"][n] = f"{type(error).__name__}: {error}"[:300]
    return found


def _some_lambda(network: Network, net: nn.Module, trace: Trace) -> float:
    """Where no budget can be reached; large, for the fit is too short for weights to come near their projections."""
    targets = Targets(exclude=network.frozen)
    macs = [c.layer.macs or 0 for c in make_plan(net, "svd", targets=targets, trace=trace).compressions]
    return 10 * MU0 * len(macs) / max(sum(macs) / 1e6, 1e-6)


# -- one process for each ------------------------------------------------------------------------------------------


def guarded(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it gives, or its error; with the package's warnings that say that something is wrong."""
    begin = time.monotonic()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            found: dict[str, Any] = work()
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"[:600]}
    told = dict.fromkeys(str(w.message) for w in heard if TOLD.search(str(w.message)))
    return found | {"warnings": list(told), "seconds": round(time.monotonic() - begin, 1)}


def measure(network: Network, path: Path) -> None:
    """Write one line; what is printed goes to a log."""
    log = os.open(path.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    torch.set_num_threads(1)
    of_costs = guarded(lambda: costs(network))
    result = {
        "name": network.name,
        "library": network.library,
        "weights": num_parameters(network.make()),
        "costs": of_costs,
    }
    with tempfile.TemporaryDirectory() as folder:
        each = {
            "deeptwist": lambda: deeptwist(network, Path(folder, "deeptwist")),
            "lc": lambda: learning_compression(
                network, Path(folder, "lc"), of_costs.get("ratio"), of_costs.get("lambda", 1e-2)
            ),
            "compress": lambda: by_compress(network, Path(folder, "compress")),
        }
        result |= {name: guarded(work) for name, work in each.items()}
    path.write_text(json.dumps(result))


def run(network: Network) -> None:
    """In a process of its own, which may crash or hang."""
    path = path_of(network)
    path.unlink(missing_ok=True)
    begin = time.monotonic()
    child = multiprocessing.get_context("fork").Process(target=measure, args=(network, path))
    child.start()
    child.join(SECONDS)
    if child.is_alive():
        child.kill()
        child.join()
    if not path.exists():
        reason = "took too long" if time.monotonic() - begin >= SECONDS else f"its process ended with {child.exitcode}"
        error = {"error": reason}
        result = {"name": network.name, "library": network.library, "weights": 0, "costs": error}
        path.write_text(json.dumps(result | {"deeptwist": error, "lc": error, "compress": error}))
    print(f"{network.library} {network.name}: {time.monotonic() - begin:.0f} s", flush=True)  # noqa: T201


def path_of(network: Network) -> Path:
    return FOLDER / (re.sub(r"\W+", "_", f"{network.library} {network.name}") + ".json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="run networks of this name or library, also where they are done")
    parser.add_argument("--table", action="store_true", help="write the table of what is done, run nothing")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    missing = import_libraries()
    for network in [] if options.table else networks():
        if network.library in missing:
            print(f"{network.library} {network.name}: left out, {missing[network.library]}", flush=True)  # noqa: T201
        elif options.only in (network.name, network.library) if options.only else not path_of(network).exists():
            run(network)
    done = [path_of(network) for network in networks() if path_of(network).exists()]
    write_table([json.loads(path.read_text()) for path in done], ROOT / "docs" / "networks.md")


def import_libraries() -> dict[str, str]:
    """Once, before processes are forked; what cannot be imported, and why."""
    cuda, torch.version.cuda = torch.version.cuda, None  # type: ignore[assignment]
    problems = {}
    for name in ("torchaudio", "torchvision", "timm", "transformers", "diffusers"):
        try:
            importlib.import_module(name)
        except Exception as error:  # of any kind: what a library does when it is imported
            problems[name] = f"{type(error).__name__}: {error}"
        torch.version.cuda = cuda  # beside a PyTorch for another CUDA torchaudio would not be imported, on CPUs too
    if "transformers" not in problems:
        sys.modules["transformers"].logging.set_verbosity_error()
    return problems


if __name__ == "__main__":
    sys.exit(main())
