"""Several processes render what one renders, in the same order."""

from collections.abc import Iterator
from pathlib import Path

from tests.support.prepare_runs import labelled, write_rows
from tests.support.tiny import tiny_tokenizer
from transformers import AutoTokenizer

from finetune_api.spec import Dataset
from finetune_api.traits import Task
from finetune_trainer.data.chat import ChatFormat
from finetune_trainer.data.render import Rendering
from finetune_trainer.prepare import workers
from finetune_trainer.prepare.near_duplicates import SignatureFile
from finetune_trainer.prepare.rendering import Renderer, RowRequest
from finetune_trainer.prepare.scan import DatasetReader, open_reader, scan
from finetune_trainer.prepare.sources import open_path
from finetune_trainer.prepare.split import SplitName
from finetune_trainer.prepare.workers import Workers

SIDES: list[SplitName] = ["train", "validation", "left out"]


def reading(work: Path, rows: list[dict[str, str] | str]) -> DatasetReader:
    path = write_rows(work / "rows.jsonl", rows)
    spec = Dataset(name="d", path=str(path), task=Task.CLASSIFICATION)
    return open_reader(spec, 0, open_path(path, str(path), None, "datasets[0]"))


def rows_with_some_bad() -> list[dict[str, str] | str]:
    rows: list[dict[str, str] | str] = [*labelled(3_000)]
    rows[700] = "no JSON"
    rows[1_900] = {"text": "", "label": "good"}
    return rows


def test_two_processes_see_and_render_what_one_does_in_the_same_order(tmp_path: Path) -> None:
    rows = rows_with_some_bad()
    rows[5] = {"text": "its answer does not fit", "label": "x" * 500}
    of_rows = reading(tmp_path, rows)
    split = of_rows.source.splits["train"]
    chat = ChatFormat(AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path / "tokenizer")))
    rendering = Rendering(Task.CLASSIFICATION, chat, max_tokens=400, labels=("bad", "good", "x"))
    renderer = Renderer(of_rows, split, rendering, 0, None)
    read: list[int] = []

    def orders() -> Iterator[RowRequest]:
        for row in of_rows.rows(split):
            read.append(row.number)
            if row.fields and row.fields["text"]:
                yield RowRequest(row, SIDES[row.number % 3], scored=row.number % 3 == 1)

    with Workers(1) as one, Workers(2) as two, SignatureFile() as first, SignatureFile() as second:
        alone = list(one.carry_out(renderer, orders(), expected=100_000))
        assert not one.started
        read.clear()
        together = two.carry_out(renderer, orders(), expected=100_000)
        begun = next(together)
        assert two.started
        assert len(read) <= 7 * workers.CHUNK_ROWS < len(rows), "rows are read as they are needed"
        assert [begun, *together] == alone
        scans = [scan(of_rows, "train", 1, near, by) for near, by in ((first, one), (second, two))]
        assert first.clusters().tolist() == second.clusters().tolist()
    assert [list(of.ranks) for of in scans[:1]] == [list(of.ranks) for of in scans[1:]]
    assert scans[0].bad == scans[1].bad
    assert [line.partition(":")[0] for outcome in alone for line in outcome.written.bad.first] == ["rows.jsonl, row 6"]
    assert sum(len(outcome.train) for outcome in alone) == 999
    assert sum(outcome.scored.count("\n") for outcome in alone) == 1_000


def test_processes_are_started_only_where_there_are_rows_enough() -> None:
    with Workers(2) as two:
        assert sum(two.carry_out(len, iter(range(workers.PARALLEL_ROWS - 1)))) == workers.PARALLEL_ROWS - 1
        assert not two.started
        assert list(two.carry_out(sum, iter(range(600)), expected=workers.PARALLEL_ROWS)) == [
            sum(range(256)),
            sum(range(256, 512)),
            sum(range(512, 600)),
        ]
        assert two.started
