"""The recipe that the tests of the stages share."""

import pytest

from tests.distributed.recipe import STAGES, check_stages, make_recipe


@pytest.fixture(scope="session")
def recipe(ranks1, tmp_path_factory):
    """The recipe's folder, with every stage run on one rank into its runs/; to be left as it is."""
    folder = make_recipe(tmp_path_factory.mktemp("recipe"))
    ranks1.run(check_stages, folder, folder / "runs", [*STAGES, "generate", "evaluate"], [])
    return folder
