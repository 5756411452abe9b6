"""Templates that need too much end in a sentence: time, memory, length and depth are bounded."""

import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.tiny import tiny_llama

from finetune_api.report import FailureClass
from finetune_trainer.data import limits
from finetune_trainer.data.chat import ChatFormat
from finetune_trainer.data.limits import within_limits
from finetune_trainer.data.templates import check_template, compile_filter, compile_template
from finetune_trainer.failures import TrainerError
from finetune_trainer.prepare.tokenizer import load_tokenizer

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GREEDY = [
    ("{{ 'a'|center(999999999) }}", "needs more than 512 MiB"),
    ("{{ '%999999999d' % 5 }}", "needs more than 512 MiB"),
    ("{{ x|center(999999999) }}", "needs more than 512 MiB"),
    ("{{ x * 100000000 }}", "renders more than 67,108,864 characters"),
    (
        "{% set n = namespace(t=x) %}{% for i in range(99) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
        "needs more than 512 MiB",
    ),
    (LOOPS, "takes longer than 1 s"),
    ("{{ 9 ** (9 ** 9) }}", "takes longer than 1 s"),
]


@pytest.fixture(autouse=True)
def nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(limits, "RENDER_SECONDS", 1.0)
    before = signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_AS)
    yield
    assert (signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_AS)) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


@pytest.mark.parametrize(("template", "sentence"), GREEDY, ids=[template[:30] for template, _ in GREEDY])
def test_a_greedy_template_is_refused_within_seconds(template: str, sentence: str) -> None:
    begun = time.process_time()
    with pytest.raises(TrainerError, match=sentence) as error:
        compile_template(template)({"x": "ab"})
    assert error.value.failure_class is FailureClass.BAD_SPEC
    assert time.process_time() - begun < 15


def test_a_greedy_filter_is_refused() -> None:
    with pytest.raises(TrainerError, match=r"The filter .* needs more than 512 MiB of memory: simplify it"):
        compile_filter("x|center(999999999) == 'b'")({"x": "a"})


@pytest.mark.parametrize("expression", [True, False])
def test_what_is_nested_too_deeply_is_refused_for_its_field(expression: bool) -> None:
    deep = "(" * 5000 + "x" + ")" * 5000
    with pytest.raises(TrainerError, match="is nested too deeply") as error:
        check_template(deep if expression else "{{ " + deep + " }}", ["x"], "datasets[0].filter", expression=expression)
    assert error.value.field == "datasets[0].filter"


def test_a_greedy_chat_template_is_refused(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path / "tiny", layers=1, hidden=16, heads=2, key_value_heads=1, intermediate=16)
    tokenizer = load_tokenizer(directory)
    tokenizer.chat_template = LOOPS
    with pytest.raises(TrainerError, match="The chat template takes longer than 1 s") as error:
        ChatFormat(tokenizer)
    assert error.value.field == "model.chatTemplate"


def test_other_threads_render_without_a_time_limit() -> None:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(within_limits(lambda: "text", "It", "field")))
    thread.start()
    thread.join()
    assert found == ["text"]
