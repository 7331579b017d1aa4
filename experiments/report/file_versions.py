"""Versions of files and data: what changed while the settings that name it stayed the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence

from experiments.config.plain import flatten_config
from experiments.records.views import Record, model_files

NOT_RECORDED = "unknown"
"""The version of records that name no hash."""
_DIGITS = 8


def file_versions(records: Iterable[Record]) -> dict[tuple[str, str], tuple[str, ...]]:
    """Return the versions of files that records read under one name, where there are several.

    Args:
        records: Records, of which the finished ones count.

    Returns:
        For each setting with its value, the first 8 digits of the hashes of its files, sorted. Records without a hash
        have the version `NOT_RECORDED`.
    """
    records = list(records)
    settings = {setting for record in records for setting in model_files(record)}
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for record in records:
        for source, version in _versions(record, settings):
            found[source].add(version)
    return {source: tuple(sorted(versions)) for source, versions in sorted(found.items()) if len(versions) > 1}


def version_settings(records: Sequence[Record]) -> list[dict[str, str]]:
    """Return, for each record, the versions of its files that tell it from others of these records, by a name for them."""
    changed = file_versions(records)
    settings = {setting for setting, _ in changed}
    return [
        {f"files of {source[0]}": version for source, version in _versions(record, settings) if source in changed}
        for record in records
    ]


def data_versions(names: Sequence[Hashable], records: Sequence[Record]) -> list[str]:
    """Return, for each record, its data's fingerprint as a text where records of one name differ in it, else "".

    Args:
        names: What tells the records apart so far.
        records: Records, of which the finished ones count.
    """
    found: dict[Hashable, set[str]] = defaultdict(set)
    prints = [record["data"]["fingerprint"] if record["status"] == "finished" else "" for record in records]
    for name, fingerprint in zip(names, prints, strict=True):
        found[name].update([fingerprint] if fingerprint else [])
    return [
        f"data {fingerprint[:_DIGITS]}" if fingerprint and len(found[name]) > 1 else ""
        for name, fingerprint in zip(names, prints, strict=True)
    ]


def _versions(record: Record, settings: Iterable[str]) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield the version of the files behind each of some settings that a finished record has a value of."""
    if record["status"] != "finished":
        return
    config, files = dict(flatten_config(record["config"])), model_files(record)
    for setting in settings:
        if config.get(setting):
            yield (setting, str(config[setting])), files.get(setting, NOT_RECORDED)[:_DIGITS]
