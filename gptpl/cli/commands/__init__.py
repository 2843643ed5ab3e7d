"""One file a command or a family of them: read the settings, call the library, print."""
