"""What all tests share."""

import hypothesis

# Shared machines are slow at times: an example may take as long as it takes.
hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")
