"""Nothing of the papers' models is in here: data sets that need more than a reader of image files."""
