"""Every verb, in the order of the help."""

from converter.cli.app import app, app_of
from converter.cli.verbs import heads as verbs_heads
from converter.cli.verbs import hub as verbs_hub
from converter.cli.verbs import read as verbs_read
from converter.cli.verbs import write as verbs_write

__all__ = ["app", "app_of"]
