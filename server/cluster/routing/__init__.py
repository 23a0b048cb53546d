"""Which replica answers a request. Pure logic: no network, no clock, no Ray."""
