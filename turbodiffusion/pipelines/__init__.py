"""From a request to frames on disk."""
