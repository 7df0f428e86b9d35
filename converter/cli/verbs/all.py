"""Every verb, in the order of the help."""

# isort: off
from converter.cli.verbs import heads, write, reshard, recipe, average, adapters, read, living, hub  # noqa: F401 - importing them registers the verbs

# isort: on
from converter.cli.app import app, app_of

__all__ = ["app", "app_of", "options_of"]


def options_of(verb: str) -> frozenset[str]:
    """The names of a verb's options, with their dashes."""
    import typer

    command = typer.main.get_command(app_of(verb))
    return frozenset(name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts))
