"""Several processes render what one renders, in the same order."""

from collections.abc import Iterator
from pathlib import Path

from tests.support.prepare_runs import labelled
from tests.support.tiny import tiny_tokenizer
from transformers import AutoTokenizer

from finetune_api.spec import Columns, Task
from finetune_trainer.data.chat import ChatFormat
from finetune_trainer.data.examples import read_example
from finetune_trainer.data.render import Rendering
from finetune_trainer.prepare import rendering
from finetune_trainer.prepare.columns import find_columns
from finetune_trainer.prepare.rendering import Order, Renderer, render_all, worker_count


def orders(rows: list[dict[str, str]], seen: list[int]) -> Iterator[Order]:
    found = find_columns(Task.CLASSIFICATION, Columns(), list(rows[0]), templated=False, where="d", field="")
    for number, row in enumerate(rows, start=1):
        seen.append(number)
        example = read_example(Task.CLASSIFICATION, number, row, found, {})
        yield Order(example, f"row {number}", documents=number % 3 > 0, scored=number % 3 == 0)


def test_two_processes_render_what_one_renders_in_the_same_order(tmp_path: Path) -> None:
    chat = ChatFormat(AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path)))
    how = Rendering(Task.CLASSIFICATION, chat, max_tokens=110, labels=("bad", "good"))
    rows = labelled(3_000)
    rows[4]["label"] = "x" * 200  # its answer does not fit
    renderer, seen = Renderer(how, "d", 0, None), list[int]()
    alone = list(render_all(renderer, orders(rows, []), workers=1))
    together = render_all(renderer, orders(rows, seen), workers=2)
    first = next(together)
    assert len(seen) <= 6 * rendering.CHUNK_ROWS < len(rows), "rows are read as they are needed"
    assert [first, *together] == alone
    assert [order.example.row for order, outcome in alone if outcome.problem] == [5]


def test_processes_are_started_only_where_there_are_rows_enough() -> None:
    assert worker_count(99_999) == 1
    assert 1 <= worker_count(100_000) <= rendering.MOST_WORKERS
