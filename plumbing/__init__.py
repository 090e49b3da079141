"""Nothing of the papers is in here: how a run is kept whole on disk, resumed, and spread over processes."""
