"""The table of all networks as a page."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

EXACT = 1e-3  # of outputs; every layer has been compared in float64 when it was extracted

HEAD = """# Networks

What the package makes of {count} networks, as they are: every network is trained for four steps with
`DeepTwist(S_D=2)` and with `LearningCompression` (three C steps, to a budget of half of the multiply-adds, or the
next of 0.75 and 0.9 that can be reached), and given to `compress()`; everything else is a default. **Weights are
random and widths tiny** (thousands of weights, not millions): this shows what works, what takes part and what is
counted, and nothing about accuracy or speed. In tiny networks the first convolution and the last linear layer,
which stay dense by default, are a large share; in real ones they are a small one.

```bash
{command}
```

{date}, {versions}, CPU.

| | networks |
|---|---:|
{summary}

**ok**: the fit ended, the network was saved, `load_compressed` on a fresh instance gave the same outputs, and
extracted and projected network agree to {exact:.0e} of their outputs' norm in evaluation mode; `dense`: so, but no
layer was compressed. **weights**: all parameters. **share**: of matrices and convolution kernels, what DeepTwist
compressed; in brackets with embeddings and other tables. **MACs**: share of the multiply-adds in these layers.
**extracted**: relative difference between extracted and projected outputs, the largest of the three. It says
little of networks whose blocks begin scaled by 1e-5 or so (layer scale: `vit_srelpos_small`,
`vit_base_patch16_rope` and others): there the comparison of every layer in float64, at extraction, is what counts.
**counted**: multiply-adds of one input by the report / by layers' shapes (what budgets go by), from batches of 1,
2, 8 and 32 inputs, as ratios to what `FlopCounterMode` counts for a batch of one, wherever they are farthest
from 1. **ranks**: whether a budget gives the same ranks at these batch sizes. **stays dense**: shares of the matrices
and kernels, and why.
"""
COLUMNS = ["network", "weights", "DeepTwist", "LC", "compress", "share", "MACs", "extracted", "counted", "ranks",
           "stays dense"]  # fmt: skip
METHODS = ("deeptwist", "lc", "compress")


def write_table(results: list[dict[str, Any]], path: Path) -> None:
    by_library: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        by_library[result["library"]].append(result)
    libraries = ["torch", *(name for name in by_library if name != "torch")]
    text = HEAD.format(
        count=len(results),
        command="python experiments/networks/networks.py",
        date=date.today().isoformat(),
        versions=", ".join(f"{name} {version(name)}" for name in [*libraries, "pytorch-lightning", "lowrank_pl"]),
        summary="\n".join(f"| {what} | {count} of {len(results)} |" for what, count in _summary(results)),
        exact=EXACT,
    )
    failed = []
    for library in libraries:
        text += f"\n## {library}\n\n| {' | '.join(COLUMNS)} |\n|---|---:|---|---|---|---:|---:|---:|---:|---|---|\n"
        for result in by_library[library]:
            text += f"| {' | '.join(_row(result))} |\n"
            failed += [(result["name"], what, problem) for what, problem in _problems(result)]
    text += "\n## What stays dense, and why\n\n| reason | networks | share there, mean |\n|---|---:|---:|\n"
    text += "".join(f"| {_safe(reason)} | {len(shares)} | {sum(shares) / len(shares):.0%} |\n"
                    for reason, shares in _all_reasons(results))  # fmt: skip
    text += "\n## What fails or differs\n\n| network | where | what it says |\n|---|---|---|\n" if failed else ""
    text += "".join(f"| {name} | {what} | {_safe(problem)} |\n" for name, what, problem in failed)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def _summary(results: list[dict[str, Any]]) -> list[tuple[str, int]]:
    named = {"DeepTwist": "deeptwist", "LearningCompression": "lc", "compress": "compress"}
    rows = [(f"{name} ok", sum(not _problem(r[method]) for r in results)) for name, method in named.items()]
    rows.append(("all three ok", sum(not any(_problem(r[method]) for method in METHODS) for r in results)))
    rows.append(
        ("of these, nothing compressed", sum(not any(r[m].get("compressed") for m in METHODS) for r in results))
    )
    rows.append(("MACs within 1 % of PyTorch's", sum(abs((_ratio(r, "reported") or 0) - 1) < 0.01 for r in results)))
    rows.append(("the same by layers' shapes", sum(abs((_ratio(r, "by_layers") or 0) - 1) < 0.01 for r in results)))
    rows.append(("same ranks at batch sizes 1, 2, 8, 32", sum(_same_ranks(r) == "same" for r in results)))
    rows.append(("half or more of the weights compressed", sum(r["deeptwist"].get("share", 0) >= 0.5 for r in results)))
    return rows


def _row(result: dict[str, Any]) -> list[str]:
    of = result["deeptwist"]
    shares = f"{of['share']:.0%} ({of['share_with_embeddings']:.0%})" if "share" in of else ""
    macs = f"{of['share_of_macs']:.0%}" if "share_of_macs" in of else ""
    differences = [result[method]["difference"] for method in METHODS if "difference" in result[method]]
    return [
        result["name"],
        f"{result['weights']:,}",
        *(_verdict(result[method]) for method in METHODS),
        shares,
        macs,
        (f"{max(differences):.0e}" if max(differences) else "0") if differences else "",
        _counted(result),
        _same_ranks(result),
        _reasons(of.get("dense", {})),
    ]


def _verdict(found: dict[str, Any]) -> str:
    if _problem(found):
        return "**fails**" if "error" in found else "**differs**"
    budget = found.get("ratio", 0.5)
    but = "" if budget == 0.5 else " (lambda)" if budget is None else f" ({budget:g})"
    return ("ok" if found["compressed"] else "dense") + but


def _problem(found: dict[str, Any]) -> str:
    if "error" in found:
        return str(found["error"])
    if found["loaded"] > 1e-6:
        return f"loaded and saved network differ by {found['loaded']:.0e}"
    if not found["difference"] <= EXACT:
        return f"extracted and projected network differ by {found['difference']:.0e}"
    return "; ".join(w for w in found["warnings"] if "not measured" in w or "not the projected" in w)


def _problems(result: dict[str, Any]) -> list[tuple[str, str]]:
    named = {method: _problem(result[method]) for method in METHODS}
    costs = result["costs"]
    for n, error in costs.get("errors", {}).items():
        named[f"costs at batch size {n}"] = error
    if "error" in costs:
        named["costs"] = costs["error"]
    for kind in ("reported", "by_layers"):
        ratio = _ratio(result, kind)
        if ratio is not None and abs(ratio - 1) >= 0.01:
            named[f"MACs {kind.replace('_', ' ')}"] = f"{ratio:.3g} of what PyTorch counts"
    if "other" in _same_ranks(result):
        named["ranks"] = _same_ranks(result)
    told = dict.fromkeys(w for part in (*METHODS, "costs") for w in result[part].get("warnings", []))
    if told:
        named["warnings"] = "; ".join(told)
    together: dict[str, list[str]] = defaultdict(list)
    for what, problem in named.items():
        together[problem].append(what)
    return [(", ".join(whats), problem) for problem, whats in together.items() if problem]


def _ratio(result: dict[str, Any], kind: str) -> float | None:
    """To what PyTorch counts at batch size 1, at the batch size where it is farthest from 1."""
    costs = result["costs"]
    one = costs.get("counted", {}).get("1")
    ratios = [(macs or 0) / one for macs in costs.get(kind, {}).values()] if one else []
    return max(ratios, key=lambda ratio: abs(ratio - 1)) if ratios else None


def _counted(result: dict[str, Any]) -> str:
    ratios = [_ratio(result, kind) for kind in ("reported", "by_layers")]
    return " / ".join("" if r is None else "1" if abs(r - 1) < 5e-4 else f"{r:.3f}" for r in ratios)


def _same_ranks(result: dict[str, Any]) -> str:
    ranks = result["costs"].get("ranks", {})
    if ranks and not any(ranks.values()):
        return "no layer"
    other = [n for n, found in ranks.items() if found != next(iter(ranks.values()))]
    missing = [n for n in result["costs"].get("errors", {})]
    return ", ".join(
        [f"other at {', '.join(other)}"] * bool(other) + [f"none at {', '.join(missing)}"] * bool(missing)
    ) or ("same" if ranks else "no budget")


SHORT = [
    (r"^TiledSVD needs groups of more than one channel", "depthwise: not for TiledSVD"),
    (r"^never called: (another module|attention) reads its weight.*", "weight read by another module"),
    (r"^the first convolution.*", "first convolution"),
    (r"^the last linear layer.*", "last linear layer"),
    (r"^\w+(\(.*?\))? of rank [\d, ]+ has .* weights", "no cheaper"),
    (r"^its weight is ", "weight "),
    (r"^no layer: ", ""),
    (r"^((?:LSTM|GRU|RNN)\.weight)_.*", r"\1"),
    (r"^ParameterList\.\d+", "ParameterList"),
]


def _together(reasons: dict[str, float]) -> Counter[str]:
    """Shares by short reasons."""
    together: Counter[str] = Counter()
    for reason, share in reasons.items():
        for pattern, short in SHORT:
            reason = re.sub(pattern, short, reason)
        together[reason] += share  # type: ignore[assignment]
    return together


def _reasons(reasons: dict[str, float], most: int = 4) -> str:
    shown = [f"{share:.0%} {reason}" for reason, share in _together(reasons).most_common(most) if share >= 0.005]
    return _safe("; ".join(shown))


def _all_reasons(results: list[dict[str, Any]], least: float = 0.005) -> list[tuple[str, list[float]]]:
    """The shares of every reason, those of most networks first."""
    found: dict[str, list[float]] = defaultdict(list)
    for result in results:
        for reason, share in _together(result["deeptwist"].get("dense", {})).items():
            if share >= least:
                found[reason].append(share)
    return sorted(found.items(), key=lambda item: (-len(item[1]), -sum(item[1])))


def _safe(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
