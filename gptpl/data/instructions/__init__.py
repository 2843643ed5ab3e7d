"""Instructions with answers: read, split, put into a prompt, and made into rows of tokens."""
