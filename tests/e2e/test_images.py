"""What the images weigh, and what is not in them."""

from __future__ import annotations

import pytest
from tests.cluster.images import Images, names
from tests.cluster.node import ctr
from tests.cluster.places import Places

MEGABYTE = 1e6


def test_the_operators_image_adds_less_than_150_megabytes_to_its_base(places: Places) -> None:
    _, *added = Images(places).layers("operator")
    assert sum(added) < 150 * MEGABYTE


@pytest.mark.parametrize("image", ["operator", "trainer"])
def test_a_change_of_code_is_a_layer_of_megabytes(places: Places, image: str) -> None:
    assert Images(places).layers(image)[-1] < 10 * MEGABYTE


@pytest.mark.parametrize("image", ["operator", "trainer"])
def test_an_image_has_no_tools_that_built_it_and_runs_as_a_user_by_number(places: Places, image: str) -> None:
    program = (
        "import importlib.util as u, os, sys; "
        "print(os.getuid(), [n for n in sys.argv[1:] if u.find_spec(n)], os.path.exists('/tools'))"
    )
    name = f"look-into-{image}"
    command = ["run", "--rm", "--read-only", names()[image], name, "python", "-c", program, "uv", "pip", "hatchling"]
    more = ["torch", "transformers"] if image == "operator" else []
    assert ctr(places, *command, *more).stdout.split() == ["1000", "[]", "False"]
