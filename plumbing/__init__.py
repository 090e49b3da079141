"""Nothing of the papers is in here: how a run is kept whole, resumed, and spread over processes."""
