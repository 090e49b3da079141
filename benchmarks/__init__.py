"""Nothing of the papers is in here: how fast the code is, and whether all of it runs on a new machine."""
