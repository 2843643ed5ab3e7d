"""One file a command: read the settings, call the library, print."""
