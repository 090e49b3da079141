"""Nothing of the papers is in here: how fast the code is, and whether a new machine runs it all."""
