"""How each family of models lays out its visual tokens: one file a family, registered with `probes.tokens.grid.family`.

Every module of this folder is imported, so a new family is one new file.
"""

from __future__ import annotations

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
