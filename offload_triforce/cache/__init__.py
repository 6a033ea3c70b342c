"""The three caches: full (host memory), retrieval and streaming (device), and the buffer they share."""
