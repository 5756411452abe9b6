"""The store gives back what was written, and refuses what is damaged."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.data.documents import DocumentBatch, DocumentStore, DocumentWriter


@st.composite
def documents(draw: st.DrawFn) -> list[tuple[list[int], list[int]]]:
    ids = st.lists(st.integers(0, 200_000), min_size=2, max_size=30)
    return [
        (tokens, draw(st.lists(st.integers(0, len(tokens) - 2), unique=True)))
        for tokens in draw(st.lists(ids, max_size=8))
    ]


@given(documents())
def test_every_document_is_read_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, written: list[tuple[list[int], list[int]]]
) -> None:
    directory = tmp_path_factory.mktemp("store")
    with DocumentWriter(directory) as writer:
        for number, (ids, positions) in enumerate(written):
            targets = [ids[position + 1] for position in positions]
            writer.add(ids, positions, targets, dataset=number % 3, row=number * 7)
    store = DocumentStore(directory)
    assert len(store) == len(written)
    assert store.lengths.tolist() == [len(ids) for ids, _ in written]
    for number, (document, (ids, positions)) in enumerate(zip(store, written, strict=True)):
        assert document.ids.tolist() == ids
        assert document.target_position.tolist() == positions
        assert document.target_id.tolist() == [ids[position + 1] for position in positions]
        assert document.target_weight.tolist() == [1.0] * len(positions)
        assert (document.id, document.dataset, document.row) == (number, number % 3, number * 7)


@given(documents(), st.integers(0, 8))
def test_documents_in_batches_are_written_as_one_by_one(
    tmp_path_factory: pytest.TempPathFactory, written: list[tuple[list[int], list[int]]], first: int
) -> None:
    apart, together = tmp_path_factory.mktemp("apart"), tmp_path_factory.mktemp("together")
    with DocumentWriter(apart) as one, DocumentWriter(together) as many:
        batches = [DocumentBatch(), DocumentBatch()]
        for number, (ids, positions) in enumerate(written):
            targets = [ids[position + 1] for position in positions]
            one.add(ids, positions, targets, dataset=2, row=number)
            batches[number >= first].add(ids, positions, targets, row=number)
        for batch in batches:
            many.extend(batch, dataset=2)
        assert len(many) == len(one)
    for path in apart.iterdir():
        assert (together / path.name).read_bytes() == path.read_bytes()


def test_a_target_outside_its_document_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="outside its document"), DocumentWriter(tmp_path) as writer:
        writer.add([1, 2, 3], [3], [1])
    with pytest.raises(ValueError, match="outside its document"):
        DocumentBatch().add([1, 2, 3], [3], [1], row=1)
    with pytest.raises(ValueError, match="the same length"):
        DocumentBatch().add([1, 2, 3], [1], [1, 2], row=1)


def test_a_store_whose_writer_was_interrupted_cannot_be_read(tmp_path: Path) -> None:
    writer = DocumentWriter(tmp_path)
    writer.add([1, 2, 3], [0], [2])
    writer.__exit__(RuntimeError, RuntimeError("killed"), None)
    with pytest.raises(ValueError, match="holds no documents"):
        DocumentStore(tmp_path)


def test_a_file_that_was_cut_is_named(tmp_path: Path) -> None:
    with DocumentWriter(tmp_path) as writer:
        writer.add([1, 2, 3], [0, 1], [2, 3])
    path = tmp_path / "ids.bin"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"ids\.bin is damaged: 8 bytes, expected 12"):
        DocumentStore(tmp_path)


def test_documents_are_read_from_the_mapped_file_and_not_from_a_copy(tmp_path: Path) -> None:
    with DocumentWriter(tmp_path) as writer:
        writer.add(np.arange(10), [0], [1])
    assert isinstance(DocumentStore(tmp_path)[0].ids, np.memmap)
