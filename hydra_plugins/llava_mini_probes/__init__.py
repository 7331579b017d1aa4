"""The launcher `local`, where Hydra finds it: it takes launchers from the namespace package `hydra_plugins` alone."""

from __future__ import annotations

from experiments.sweeps import local_launcher


class LocalLauncher(local_launcher.LocalLauncher):
    """Runs the jobs of a sweep on all cores or all GPUs of this machine."""
