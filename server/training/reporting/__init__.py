"""What a training says about itself: curves, warnings, and the report to a server."""
