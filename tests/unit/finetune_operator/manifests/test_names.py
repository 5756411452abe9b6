import re

from hypothesis import given
from hypothesis import strategies as st

from finetune_api.base import Stage
from finetune_operator.manifests.names import child_name, shared_name

DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
JOB_NAMES = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", fullmatch=True)


@given(JOB_NAMES, st.sampled_from(Stage), st.integers(1, 9999))
def test_pods_and_services_of_any_job_have_legal_names(job: str, stage: Stage, number: int) -> None:
    worker = child_name(job, stage, number) + "-worker-4095"
    assert len(worker) <= 63
    assert DNS_1035.fullmatch(worker)


@given(JOB_NAMES, st.sampled_from(["config", "report", "run", "trainer"]))
def test_shared_objects_of_any_job_have_legal_names(job: str, what: str) -> None:
    name = shared_name(job, what)
    assert len(name) <= 63
    assert DNS_1035.fullmatch(name)


def test_short_names_are_kept_readable() -> None:
    assert child_name("support-llama", Stage.TRAIN, 2) == "support-llama-train-2"
    assert shared_name("support-llama", "report") == "support-llama-report"


def test_a_name_that_gets_a_prefix_is_no_other_jobs_name() -> None:
    assert shared_name("7b", "config") != shared_name("ft-7b", "config")


@given(JOB_NAMES, JOB_NAMES, st.sampled_from(["config", "run"]))
def test_two_jobs_never_share_an_object(one: str, other: str, what: str) -> None:
    assert one == other or shared_name(one, what) != shared_name(other, what)


def test_long_names_with_the_same_beginning_stay_apart() -> None:
    long = "a" * 62
    assert child_name(long + "b", Stage.TRAIN, 1) != child_name(long + "c", Stage.TRAIN, 1)
