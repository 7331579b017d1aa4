"""Packages that only a part of the probes needs, checked where that part starts."""

from __future__ import annotations

import importlib.util


def require_package(package: str, purpose: str) -> None:
    """Check that a package is installed, without importing it.

    Args:
        package: Name by which the package is imported.
        purpose: What needs it, as the subject of the error.

    Raises:
        ImportError: The package is not installed.

    Example:
        >>> require_package("torch", "a model")
        >>> require_package("no_such_package", "this example")
        Traceback (most recent call last):
        ImportError: this example needs no-such-package: pip install no-such-package
    """
    if importlib.util.find_spec(package) is None:
        distribution = package.replace("_", "-")
        raise ImportError(f"{purpose} needs {distribution}: pip install {distribution}", name=package)
