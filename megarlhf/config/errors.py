"""The error of everything that a user wrote wrong."""


class ConfigError(ValueError):
    """What a user wrote in a configuration is not valid; one violation per line, each with the file it came from."""
