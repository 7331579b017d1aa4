"""Figures of probe results: attention by layer, maps over the image, and words of the logit lens.

Each function returns a matplotlib figure that a notebook shows inline. It does not use pyplot, so no figure has to be
closed.
"""

from probes.plots.attention_lines import plot_attention
from probes.plots.image_maps import plot_patches
from probes.plots.lens_words import plot_lens, plot_words
from probes.plots.style import GROUP_LINES

__all__ = ["GROUP_LINES", "plot_attention", "plot_lens", "plot_patches", "plot_words"]
