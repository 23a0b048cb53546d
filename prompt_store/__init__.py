"""What a soft prompt is and where it is kept."""
