"""Learning rates: what to do when a training diverges."""
