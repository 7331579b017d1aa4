"""What a GPU is needed for: tests, cost of 7B and 8B shapes, a long video and the cost of recording, in ten minutes."""
