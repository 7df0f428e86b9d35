"""Every verb, in the order of the help."""

from converter.cli import verbs_heads, verbs_write, verbs_read, verbs_hub  # noqa: F401, I001 - importing them registers the verbs
from converter.cli.app import app, app_of

__all__ = ["app", "app_of"]
