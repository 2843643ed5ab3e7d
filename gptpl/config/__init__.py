"""Settings: composed by Hydra, checked against the classes that they are for; only this room knows Hydra."""
