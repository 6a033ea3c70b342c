"""An OpenAI-compatible server over one engine, and its page."""
