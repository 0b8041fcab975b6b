"""Small Vision Transformers trained from scratch, in JAX, Flax and optax."""
