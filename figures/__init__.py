"""Nothing of the papers' models is in here: how their figures are drawn, from your runs, and what
their tables say."""
