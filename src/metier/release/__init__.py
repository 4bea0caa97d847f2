"""May it ship, and in what form."""
