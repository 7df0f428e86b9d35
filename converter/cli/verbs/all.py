"""Every verb, in the order of the help."""

# isort: off
from converter.cli.verbs import heads, write, read, hub  # noqa: F401 - importing them registers the verbs

# isort: on
from converter.cli.app import app, app_of

__all__ = ["app", "app_of"]
