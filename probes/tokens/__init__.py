"""Token maps: the token group of every prompt position, and where each visual token lies in its image."""
