"""transformers models, driven through the attention registry: no model code of our own."""
