"""Questions and descriptions about labelled photographs, one alone or several on a grid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from experiments.data.balanced_questions import QuestionAnswer, grid_cell_name, neighbours

DESCRIBE_PROMPT = "Describe the picture."
# Answers to questions about a single photograph beyond its class name: animal or vehicle, and where it usually is.
CLASS_FACTS = {
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


def with_article(name: str) -> str:
    """Return a class name with its indefinite article."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def single_photo_questions(name: str) -> dict[str, list[QuestionAnswer]]:
    """Return all questions of each type about one photograph of class `name`."""
    pairs = {"caption": [(DESCRIBE_PROMPT, describe_photos([name], 1))], "name": [("What is this?", name)]}
    if name in CLASS_FACTS:
        animal_or_vehicle, usual_place = CLASS_FACTS[name]
        pairs["animal or vehicle"] = [("Is this an animal or a vehicle?", animal_or_vehicle)]
        pairs["usual place"] = [("Where does one usually see this?", usual_place)]
    return pairs


def photo_grid_questions(
    names: Sequence[str], classes: Sequence[str], grid_size: int
) -> dict[str, list[QuestionAnswer]]:
    """Return all questions of each type about a grid of photographs.

    Args:
        names: Class of each photograph, in reading order.
        classes: All classes of the data set.
        grid_size: Photographs per side of the grid.
    """
    counts = Counter(names)
    unique = [i for i, name in enumerate(names) if counts[name] == 1]
    return {
        "place": [(f"What is at {grid_cell_name(i, grid_size)}?", name) for i, name in enumerate(names)],
        "where": [(f"Where is the {names[i]}?", grid_cell_name(i, grid_size)) for i in unique],
        "count": [(f"How many pictures show {with_article(c)}?", str(counts[c])) for c in classes],
        "existence": [(f"Is there {with_article(c)}?", "yes" if counts[c] else "no") for c in classes],
        "beside": [
            (f"What is {direction} the {names[i]}?", names[j])
            for i in unique
            for direction, j in neighbours(i, grid_size, [True] * len(names))
        ],
        "row": [(f"Which row holds the {names[i]}?", f"row {i // grid_size + 1}") for i in unique],
    }


def describe_photos(names: Sequence[str], grid_size: int) -> str:
    """Return one long answer that names all photographs of a grid in reading order.

    Args:
        names: Class of each photograph, in reading order.
        grid_size: Photographs per side of the grid.
    """
    if grid_size == 1:
        return f"A photo of {with_article(names[0])}."
    rows = (", ".join(names[row * grid_size : (row + 1) * grid_size]) for row in range(grid_size))
    return " ".join(f"Row {number}: {row}." for number, row in enumerate(rows, 1))
