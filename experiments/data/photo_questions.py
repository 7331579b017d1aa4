"""What is asked and said about photographs, one alone or several on a grid, whose classes are known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from experiments.data.balanced_questions import Pair, beside, cell_name

DESCRIBE = "Describe the picture."
# What can be asked about one photograph beyond its name, where this is known of its class: kind, where it usually is.
KNOWN = {
    "airplane": ("a vehicle", "in the air"),
    "automobile": ("a vehicle", "on the road"),
    "bird": ("an animal", "in the air"),
    "cat": ("an animal", "at home"),
    "deer": ("an animal", "in the woods"),
    "dog": ("an animal", "at home"),
    "frog": ("an animal", "in a pond"),
    "horse": ("an animal", "on a farm"),
    "ship": ("a vehicle", "on the water"),
    "truck": ("a vehicle", "on the road"),
}


def some(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def about_one(name: str) -> dict[str, list[Pair]]:
    """All questions of each kind about one photograph."""
    pairs = {"caption": [(DESCRIBE, description([name], 1))], "name": [("What is this?", name)]}
    if name in KNOWN:
        kind, place = KNOWN[name]
        pairs["animal or vehicle"] = [("Is this an animal or a vehicle?", kind)]
        pairs["usual place"] = [("Where does one usually see this?", place)]
    return pairs


def about_grid(names: Sequence[str], classes: Sequence[str], grid: int) -> dict[str, list[Pair]]:
    """All questions of each kind about a grid that shows `names` in reading order."""
    counts = Counter(names)
    once = [i for i, name in enumerate(names) if counts[name] == 1]
    return {
        "place": [(f"What is at {cell_name(i, grid)}?", name) for i, name in enumerate(names)],
        "where": [(f"Where is the {names[i]}?", cell_name(i, grid)) for i in once],
        "count": [(f"How many pictures show {some(c)}?", str(counts[c])) for c in classes],
        "existence": [(f"Is there {some(c)}?", "yes" if counts[c] else "no") for c in classes],
        "beside": [(f"What is {word} the {names[i]}?", names[j]) for i in once for word, j in beside(i, grid)],
        "row": [(f"Which row holds the {names[i]}?", f"row {i // grid + 1}") for i in once],
    }


def description(names: Sequence[str], grid: int) -> str:
    """One long answer: all that there is to see, in reading order."""
    if grid == 1:
        return f"A photo of {some(names[0])}."
    rows = (", ".join(names[row * grid : (row + 1) * grid]) for row in range(grid))
    return " ".join(f"Row {number}: {row}." for number, row in enumerate(rows, 1))
