"""What all tests share."""

import os

import hypothesis

# Workers share the cores: with more threads each, they would wait for one another. Set before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Shared machines are slow at times: an example may take as long as it takes.
hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")
