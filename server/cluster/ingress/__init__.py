"""The door of a cluster: authenticates, chooses a replica, and passes bytes both ways. No Ray in here."""
