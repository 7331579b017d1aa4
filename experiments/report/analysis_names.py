"""Names that tell analyses of one model apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from experiments.config.identity import IGNORED_SETTINGS
from experiments.config.plain import flatten_config
from experiments.records.files import Records
from experiments.records.views import Record, analyses_one_model, record_label
from experiments.report.file_versions import data_versions, version_settings
from experiments.report.formatting import setting_text


def name_analyses(records: Records) -> Records:
    """Give analyses of equal names the settings in which they differ, such as the kind of picture.

    Args:
        records: The records of a results folder.

    Returns:
        The same records. Analyses of one experiment and one name have longer names: "smol_grids, seed 0,
        data.parts=[2x2]". All other names are as before.
    """
    same_name: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in filter(analyses_one_model, (*records.finished, *records.failed)):
        same_name[record["experiment"], record_label(record)].append(record)
    names = {
        record["id"]: ", ".join([label, *settings])
        for (_, label), group in same_name.items()
        if len(group) > 1
        for record, settings in zip(group, _differing_settings(group), strict=True)
    }
    finished, failed = (
        tuple({**record, "name": names.get(record["id"], record["name"])} for record in part)
        for part in (records.finished, records.failed)
    )
    return replace(records, finished=finished, failed=failed)


def _differing_settings(records: Sequence[Record]) -> list[list[str]]:
    flat = [
        dict(flatten_config(record["config"])) | versions
        for record, versions in zip(records, version_settings(records), strict=True)
    ]
    keys = sorted({key for settings in flat for key in settings} - {"seed", *IGNORED_SETTINGS})
    differing = [key for key in keys if len({str(settings.get(key)) for settings in flat}) > 1]
    texts = [[setting_text(key, settings[key]) for key in differing if key in settings] for settings in flat]
    data = data_versions(list(map(tuple, texts)), records)
    return [[*text, *filter(None, [version])] for text, version in zip(texts, data, strict=True)]
