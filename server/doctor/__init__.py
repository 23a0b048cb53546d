"""``prelude doctor``: what this machine can serve, and what is wrong with it."""
