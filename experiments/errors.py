"""Errors that wrong input causes, as one line for the terminal."""

from __future__ import annotations

import difflib
import os
import re
import socket
import ssl
import sys
from collections.abc import Iterable
from typing import NoReturn

import yaml  # type: ignore[import-untyped]
from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from experiments.config.renamed_keys import current_name

FULL_ERROR_VARIABLE = "HYDRA_FULL_ERROR"
INPUT_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError, ImportError)
"""What wrong input raises. Anything else is a bug, and keeps its traceback."""


class MissingDeviceError(ValueError):
    """This machine lacks a device. That is no failure of a cell, which may run on another machine."""


_CONNECTION_ERRORS = {
    "httpx": ("HTTPError",),
    "httpx2": ("HTTPError",),
    "huggingface_hub": ("HfHubHTTPError", "LocalEntryNotFoundError", "OfflineModeIsEnabled"),
    "requests": ("RequestException",),
    "urllib": ("URLError",),
    "urllib3": ("HTTPError",),
}
"""Base classes of what the network and the model hub raise, by package. By name: no cell should wait for the imports."""


class HubError(OSError):
    """The network or the model hub failed. That is no failure of a cell, which may run on another machine or later."""


class UnfinishedCellError(ValueError):
    """A cell has no accuracy to report: it failed, or another process runs it."""


_HYDRA_MESSAGES = {
    r"Error parsing override '(.+?)'\s+missing EQUAL at '<EOF>'": r"\1: has no '='; write KEY=VALUE, such as experiment=\1",
    r"Ambiguous value for argument '(.+?)'": r"\1: several values for one run; add -m to run each, or write [A,B] for a list",
    r"Error merging override (\S+)\s+(Value .+)": r"\1: \2",
    r"In '(experiment/[^']+)': ConfigKeyError raised while composing config:\s+Key 'experiment' not in 'Config'": (
        r"\1: begin the file with `# @package _global_`, so that its settings are those of the whole configuration"
    ),
    r"Error in call to target '[^']+':\s+ValueError\('(hydra\..+?)'\)": r"\1",
}
"""Messages of Hydra, and what is printed instead: the override, file or setting first, and no grammar."""

# Read at import: `experiments.run` sets the variable afterwards, so that Hydra raises instead of printing.
full_error_requested = os.environ.get(FULL_ERROR_VARIABLE) == "1"


def exit_with_error(error: BaseException | str) -> NoReturn:
    """End the program with one line and status 1, or with the traceback if HYDRA_FULL_ERROR=1 was set."""
    if full_error_requested and isinstance(error, BaseException):
        raise error
    print(f"error: {one_line(error)}", file=sys.stderr)
    sys.exit(1)


def is_connection_error(error: BaseException) -> bool:
    """Return whether the network or the model hub caused an error: no connection, no such repository, or no access.

    Args:
        error: The error. Its causes count too.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)):
            return True
        for base in type(cause).__mro__:
            if base.__name__ in _CONNECTION_ERRORS.get(base.__module__.split(".")[0], ()):
                return True
        cause = cause.__cause__ or cause.__context__
    return False


def one_line(error: BaseException | str) -> str:
    """Return an error's message as one line.

    Hydra and OmegaConf need several lines for a setting that is required or does not exist, and a plugin that is not
    installed needs a hint.
    """
    causes = (error, error.__cause__) if isinstance(error, HydraException) else (error,)
    for cause in causes:
        if isinstance(cause, MissingMandatoryValue):
            return f"{cause.full_key}: required; add {cause.full_key}=VALUE"
        if isinstance(cause, InterpolationResolutionError) and cause.full_key:
            return f"{cause.full_key}: {str(cause).splitlines()[0]}"
        if isinstance(cause, OverrideParseException) and cause.override not in str(cause):
            return f"{cause.override}: {' '.join(str(cause).split())}"
        if isinstance(cause, yaml.MarkedYAMLError) and (mark := cause.problem_mark):
            return f"{mark.name}: line {mark.line + 1}, column {mark.column + 1}: {cause.problem or cause.context}"
    texts = [str(cause) for cause in causes if cause is not None]
    texts = texts[: 1 if texts[-1] in texts[0] else None]  # Hydra's message may end in that of its cause
    text = " ".join(re.split(r"\n\s*full_key", text)[0] for text in texts)
    for message, ours in _HYDRA_MESSAGES.items():
        if found := re.search(message, text):
            return found.expand(ours)
    if key := _unknown_setting("\n".join(texts)):
        return no_such_setting(key)
    if line := _unknown_option("\n".join(texts)):
        return line
    return " ".join((text + _plugin_hint(text)).split())


def no_such_setting(key: str) -> str:
    """Return the message for a setting that does not exist, with its new name if it was renamed, or a similar name.

    Args:
        key: Its dotted name.
    """
    if (new := current_name(key)) != key:
        return f"{key}: renamed; use {new}"
    from experiments.config.documentation import settings  # imports all schemas, which only an error needs

    if owners := [setting.only for setting in settings() if setting.key == key and setting.only]:
        group = key.partition(".")[0]
        return f"{key}: the chosen {group} has no such setting; it belongs to {' or '.join(owners)} (docs/settings.md)"
    names = [setting.key for setting in settings()]
    groups = {name.rpartition(".")[0] for name in names} - {""}
    advice = _did_you_mean(key, [*names, *groups, "experiment"])
    return f"{key}: no such setting{advice}; `python -m experiments.run --help` lists all"


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    similar = difflib.get_close_matches(name, list(names), n=1, cutoff=0.75)
    return f" (did you mean {similar[0]}?)" if similar else ""


def _unknown_setting(text: str) -> str | None:
    """Return the dotted setting that OmegaConf does not know, if this is its message."""
    if not re.search(r"Key '[^']*' (is )?not in ", text):
        return None
    # A mapping (`train={steps: 5}`) is overridden as a whole, and a whole group may be unknown: the longer name is complete.
    names = re.findall(r"Could not override '([^']+)'", text) + re.findall(r"full_key: (\S+)", text)
    return max(names, key=len, default=None)


def _unknown_option(text: str) -> str | None:
    """Return one line for an option that a group lacks, if this is Hydra's message, which ends in its search path."""
    listed = r"Could not find '([^']+)/([^'/]+)'\s+Available options in '[^']+':(.*?)Config search path"
    if not (found := re.search(listed, text, re.DOTALL)):
        return None
    group, name, lines = found.groups()
    options = [option for option in lines.split() if not option.startswith("schema")]  # those are for our files alone
    similar = _did_you_mean(name, options)
    if group == "compressor":
        from llava_mini.compressors import COMPRESSORS  # takes seconds, which only an error needs

        similar = f", but compressor.name={name} exists" if name in COMPRESSORS else similar
    return f"{group}: no option '{name}'{similar}; it has {', '.join(options)}{_plugin_hint(text)}"


def _plugin_hint(text: str) -> str:
    if "Could not" in text and "hydra/launcher" in text:
        return "; joblib, submitit_local and submitit_slurm come with pip install '.[sweep]'"
    sweeper = re.search(r"Could not find 'hydra/sweeper/(optuna|ax|nevergrad)'", text)
    return f"; it comes with pip install hydra-{sweeper[1]}-sweeper" if sweeper else ""
