"""The machine: its cards, memory, speeds and versions, and what it lacks."""
