"""CUDA graphs: small steps that are captured once and replayed."""
