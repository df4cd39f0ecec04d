"""A driver that sends blobs to echo agents."""
