"""A directive that shows the JSON Schema of records as tables, one for each part.

```{record-schema} ../record.schema.json
```
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

OUTCOMES = "^[01]*$"


class RecordSchema(SphinxDirective):
    """Show every part of the schema in a section of its own, whole records first."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        relative, path = self.env.relfn2path(self.arguments[0], self.env.docname)
        self.env.note_dependency(relative)
        schema = json.loads(Path(path).read_text())
        first = [option["$ref"].rsplit("/", 1)[-1] for option in schema["oneOf"]]
        names = [*first, *sorted(set(schema["$defs"]) - set(first))]
        text = "\n\n".join(part_as_markdown(name, schema["$defs"][name]) for name in names)
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def part_as_markdown(name: str, part: dict[str, Any]) -> str:
    """Return one object of the schema as a heading, its description and a table of its fields."""
    required = part.get("required", [])
    rows = []
    for field, value in part.get("properties", {}).items():
        kind = describe_type(value) if field in required else f"{describe_type(value)} (optional)"
        rows.append(f"| `{field}` | {kind} | {value.get('description', '').replace('|', chr(92) + '|')} |")
    table = "\n".join(["| field | type | meaning |", "|---|---|---|", *rows])
    return f"## {name}\n\n{part.get('description', '')}\n\n{table}"


def describe_type(value: dict[str, Any]) -> str:
    """Return the type of a value in words; a part is a link to its section."""
    if "$ref" in value:
        name = value["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "const" in value:
        return f"`{json.dumps(value['const'])}`"
    if "enum" in value:
        return " or ".join(f"`{json.dumps(choice)}`" for choice in value["enum"])
    if "anyOf" in value:
        return " or ".join(describe_type(choice) for choice in value["anyOf"])
    if value.get("type") == "array":
        return f"list of {describe_type(value['items'])}" if value.get("items") else "list"
    if value.get("type") == "object":
        entries = value.get("additionalProperties")
        return f"object of {describe_type(entries)}" if isinstance(entries, dict) and entries else "object"
    return "string of 0 and 1" if value.get("pattern") == OUTCOMES else value.get("type", "any")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("record-schema", RecordSchema)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
