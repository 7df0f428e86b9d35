"""Every verb, in the order of the help."""

from converter.cli.app import app, app_of

__all__ = ["app", "app_of"]
