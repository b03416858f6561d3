"""Pure maths: noise processes, samplers, keyed randomness. Tensors in, tensors out; no models, no files."""
