"""Every verb, in the order of the help."""

from converter.cli import verbs_write, verbs_read  # noqa: F401, I001 - importing them registers the verbs
from converter.cli.app import app, app_of

__all__ = ["app", "app_of"]
