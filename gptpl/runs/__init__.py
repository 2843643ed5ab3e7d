"""One run as a library: what it was trained on, and its model loaded to be used."""
