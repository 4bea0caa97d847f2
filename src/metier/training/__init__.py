"""How weights move: one generator of steps, and what plans, feeds, saves and watches it."""
