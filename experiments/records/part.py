"""The base of all parts of a record."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """A part of a record. Keys that are not listed are allowed: newer records may have more."""

    model_config = ConfigDict(extra="allow", strict=True)
