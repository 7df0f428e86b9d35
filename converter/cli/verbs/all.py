"""Every verb, in the order of the help."""

# isort: off
from converter.cli.verbs import heads, write, reshard, recipe, average, adapters, read, living, hub  # noqa: F401 - importing them registers the verbs

# isort: on
from converter.cli.app import app, command_of

__all__ = ["app", "command_of", "options_of"]


def options_of(verb: str) -> frozenset[str]:
    """The names of a verb's options, with their dashes."""
    return frozenset(
        name for parameter in command_of(verb).params for name in (*parameter.opts, *parameter.secondary_opts)
    )
