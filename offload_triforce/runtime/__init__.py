"""One model wired up: its caches, levels and drafts, and the texts that they work on."""
