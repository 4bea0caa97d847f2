"""Runs side by side: what differs, what came of it, and which figures may be held against each other."""
