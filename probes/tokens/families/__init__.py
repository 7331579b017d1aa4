"""Visual layouts of the supported model families, one module per family.

Importing this package imports every module in it, so one new file that calls
`probes.tokens.layout_registry.register_layout` adds a family.
"""

from __future__ import annotations

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
