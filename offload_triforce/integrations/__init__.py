"""Other libraries' own doors to this runtime."""
