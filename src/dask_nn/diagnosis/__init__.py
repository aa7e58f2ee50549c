"""Can this cluster train? Facts of all its processes, and what they mean."""
