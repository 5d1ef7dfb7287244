"""From a batch to a loss: the mathematics of a paper on one page each."""
