"""A stranger's package: a class of their own for every place of gptpl's config."""
