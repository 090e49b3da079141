"""Nothing of the papers' models is in here: how images are read, and data sets that need a file."""
