"""Figures of probe results: attention by layer, maps over the image, and words of the logit lens.

Each function returns a matplotlib figure that a notebook shows inline. It does not use pyplot, so no figure has to be
closed.
"""

from probes.optional_packages import require_package

# Before the modules below, whose imports would end in an error without the command that mends it.
require_package("matplotlib", "probes.plots")

from probes.plots.attention_lines import plot_attention  # noqa: E402
from probes.plots.image_maps import plot_patches  # noqa: E402
from probes.plots.lens_words import plot_lens, plot_words  # noqa: E402
from probes.plots.style import GROUP_LINES  # noqa: E402

__all__ = ["GROUP_LINES", "plot_attention", "plot_lens", "plot_patches", "plot_words"]
