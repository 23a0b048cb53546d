"""What the server says about itself: state, callers, the running batch, load."""
