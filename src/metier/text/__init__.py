"""Messages to token rows and back; no torch."""
