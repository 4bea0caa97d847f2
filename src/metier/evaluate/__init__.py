"""Better than what, and how sure: the same cases, generator, renderer and graders for every arm."""
