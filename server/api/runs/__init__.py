"""Training runs that clients report, and that the server keeps."""
