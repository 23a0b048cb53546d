"""The console: a web page over the public HTTP routes, and its sessions."""
