"""Plain text as training data: encoding, the cache of token ids, sequences."""
