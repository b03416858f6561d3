"""What a run will need, said before anything is loaded: memory and time, from the shapes of the networks alone."""
