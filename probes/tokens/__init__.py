"""Token maps: which position of a prompt is text and which is vision, and where in the image it lies."""
