"""Files by content: a directory, or an object store with local copies."""
