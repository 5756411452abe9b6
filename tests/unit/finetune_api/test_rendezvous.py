"""Where ranks meet, from the variables of whoever started the machine."""

from __future__ import annotations

import pytest
from tests.support.runpod_env import runpod_variables

from finetune_api.rendezvous import Rendezvous, rendezvous_of

PET = {
    "PET_NNODES": "3",
    "PET_NODE_RANK": "2",
    "PET_NPROC_PER_NODE": "4",
    "PET_MASTER_ADDR": "job-worker-0",
    "PET_MASTER_PORT": "23456",
}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Rendezvous()),
        (PET, Rendezvous(3, 2, 4, "job-worker-0", 23456)),
        (runpod_variables(1, 3, 29500, "10.65.0.2", "10.65.0.3"), Rendezvous(3, 1, 1, "10.65.0.2", 29500, "10.65.0.3")),
        ({"PET_NPROC_PER_NODE": "4"}, Rendezvous(ranks_per_node=4)),
        # What the operator or `finetune run` said wins over what the machine's owner set.
        (runpod_variables(1, 3, 29500) | PET, Rendezvous(3, 2, 4, "job-worker-0", 23456)),
        (runpod_variables(1, 3, 29500) | {"PET_NNODES": "1"}, Rendezvous()),
        (
            {"NUM_NODES": "2", "NODE_RANK": "1", "NUM_TRAINERS": "8", "MASTER_ADDR": "a", "NODE_ADDR": "10.0.0.3/24"},
            Rendezvous(2, 1, 8, "a", 23456, "10.0.0.3"),
        ),
        # Others use one of these names for purposes of theirs.
        ({"NUM_NODES": "3"}, Rendezvous()),
        ({"NODE_RANK": "1", "WORLD_SIZE": "8"}, Rendezvous()),
    ],
)
def test_a_machine_knows_its_place(environ: dict[str, str], expected: Rendezvous) -> None:
    assert rendezvous_of(environ) == expected


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"NODE_RANK": "3"}, "NODE_RANK is 3, but NUM_NODES is 3: machines are numbered from 0."),
        ({"NODE_RANK": "first"}, "NODE_RANK is 'first', but must be an integer of at least 0."),
        ({"NUM_TRAINERS": "0"}, "NUM_TRAINERS is '0', but must be an integer of at least 1."),
        ({"PRIMARY_PORT": "ssh"}, "PRIMARY_PORT is 'ssh', but must be an integer of at least 1."),
        (
            {"PRIMARY_ADDR": "", "MASTER_ADDR": ""},
            "NUM_NODES is 3, but PRIMARY_ADDR, the address of machine 0, is not set.",
        ),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(changes: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError) as wrong:  # noqa: PT011 - the whole sentence is compared
        rendezvous_of(runpod_variables(1, 3, 29500) | changes)
    assert str(wrong.value) == sentence


@pytest.mark.parametrize("given", [Rendezvous(), Rendezvous(3, 2, 4, "job-worker-0", 29500, "10.0.0.3")])
def test_a_launcher_reads_back_the_rendezvous_that_it_was_given(given: Rendezvous) -> None:
    assert rendezvous_of(runpod_variables(0, 8, 1) | given.to_environment()) == given


def test_ranks_follow_from_the_number_of_the_machine() -> None:
    assert list(Rendezvous(nodes=3, node_rank=2, ranks_per_node=4).ranks) == [8, 9, 10, 11]
