"""The recipe, trained once, that the mistakes are made with."""

from tests.distributed.conftest import recipe  # noqa: F401
