"""The command line before Hydra sees it, and config folders named on it: files from elsewhere, which Hydra would
follow wherever they lead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lowrank_pl.cli.configs import read_stored
from lowrank_pl.run_files import read_facts


def take_options(words: list[str]) -> tuple[list[str], bool]:
    """Remove our own options from a Hydra command line: the names after `--allow`, and whether `--trust` is there."""
    allow: list[str] = []
    while "--allow" in words[:-1]:
        place = words.index("--allow")
        allow.append(words[place + 1])
        del words[place : place + 2]
    trusted = "--trust" in words
    if trusted:
        words.remove("--trust")
    return allow, trusted


def options_first(words: list[str]) -> list[str]:
    """In the order that Hydra's parser needs: it takes no option between overrides."""
    options: list[str] = []
    overrides: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word in _WITH_VALUE and rest:
            options += [word, rest.pop(0)]
        else:
            (options if word.startswith("-") else overrides).append(word)
    return [*options, *overrides]


def overrides_of(words: list[str]) -> list[str]:
    """The overrides of a command line that `options_first` has put in order."""
    pairs = zip(["", *words], words, strict=False)
    return [word for before, word in pairs if not word.startswith("-") and before not in _WITH_VALUE]


_WITH_VALUE = ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p", "--cfg", "-c")


def check_foreign(words: list[str]) -> tuple[bool, dict[str, str]]:
    """Whether the command line names a folder of configs, and the links of a run's stored config that it names.

    Raises `ValueError` for a config in which somebody else decides what Hydra does before our own code runs.
    """
    folder, name = _option(words, "--config-dir", "-cd"), _option(words, "--config-name", "-cn")
    if folder is None:
        return False, {}
    for file in sorted(Path(folder).glob("**/*.yaml")) if name is None else []:
        _refuse_hydra(file, Path(folder))
    if name is None:
        return True, {}
    file = Path(folder, name if name.endswith(".yaml") else f"{name}.yaml")
    if file.is_file():
        try:
            read_stored(file)
        except ValueError as error:
            raise ValueError(f"{error}. If you wrote it, add --trust") from error
    facts = read_facts(file.parent)
    return True, {} if facts is None else facts["links"]


def _refuse_hydra(file: Path, folder: Path) -> None:
    inner = file.relative_to(folder).parts
    if ".hydra" in inner or file.name == "multirun.yaml":
        raise ValueError(f"{file} is what a run has left: keep your configs in a folder without runs")
    text = file.read_text()
    values: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    if "@package hydra" in text or "hydra" in inner or (isinstance(values, dict) and "hydra" in values):
        raise ValueError(f"{file} changes settings of Hydra. If you wrote it, add --trust")


def _option(words: list[str], *names: str) -> str | None:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        for name in names:
            if word == name:
                return following
            if word.startswith(f"{name}="):
                return word.partition("=")[2]
    return None
