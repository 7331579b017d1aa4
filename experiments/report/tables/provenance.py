"""Provenance table: code, library versions, device and time of every record."""

from __future__ import annotations

from experiments.records.files import Records
from experiments.records.views import record_seed
from experiments.report.formatting import NONE
from experiments.report.tables.table import Table, data_frame


def provenance_table(records: Records) -> Table:
    """Build the table that lists where every finished or failed record comes from."""
    keys = ("commit", "code", "torch", "transformers", "python", "device", "started", "seconds", "train_seconds")
    data = []
    for record in (*records.finished, *records.failed):
        provenance = record.get("provenance") or {}
        row = {"record": record["id"], "name": record["name"], "seed": record_seed(record), "status": record["status"]}
        fingerprint = (record.get("data") or {}).get("fingerprint")
        data.append({**row, "data": fingerprint, **{key: provenance.get(key) for key in keys}})
    frame = data_frame(data, ("record", "name", "seed", "status", "data", *keys))
    text = frame.astype(object).where(frame.notna(), NONE).astype(str)
    for key in ("commit", "code", "data"):
        text[key] = text[key].str[:8] if len(text) else text[key]
    text.columns = [column.replace("_", " ").capitalize() for column in text.columns]
    caption = "Provenance of every record (commit, code and data shortened to 8 characters)."
    return Table("provenance", caption, frame, text, ("Seed", "Seconds", "Train seconds"))
