"""An OpenAI-compatible server on top of one engine. ``app.make_app`` puts it together, ``serving.serve`` runs it."""
