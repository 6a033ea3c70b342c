"""A request interpreted, text in and out, the answer."""
