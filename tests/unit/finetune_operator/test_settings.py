import pytest
from tests.unit.finetune_operator.decision.world import SPEC

from finetune_api.spec import FineTuneJobSpec
from finetune_operator.errors import UserError
from finetune_operator.settings import from_environment


def test_everything_has_a_default() -> None:
    settings = from_environment({})
    assert (settings.namespaces, settings.workers, settings.metrics_port) == ((), 8, 8080)
    assert settings.identity


def test_namespaces_are_a_list() -> None:
    assert from_environment({"FINETUNE_NAMESPACES": "ml, research,"}).namespaces == ("ml", "research")


@pytest.mark.parametrize(
    ("text", "gpu", "price"),
    [
        ('{"A100-80GB": 1.8, "default": 3}', "A100-80GB", 1.8),
        ('{"default": 3}', "H100", 3.0),
        ("2", None, 2.0),
        ("{}", "H100", None),
    ],
)
def test_the_price_is_that_of_the_jobs_gpu(text: str, gpu: str | None, price: float | None) -> None:
    settings = from_environment({"FINETUNE_PRICE_PER_GPU_HOUR": text})
    spec = FineTuneJobSpec.model_validate(SPEC | {"topology": {"gpuType": gpu} if gpu else {}})
    assert settings.environment(spec).price_per_gpu_hour == price


@pytest.mark.parametrize(
    ("name", "text"), [("WORKERS", "many"), ("PRICE_PER_GPU_HOUR", "[1]"), ("PRICE_PER_GPU_HOUR", "{")]
)
def test_what_cannot_be_read_is_said_with_its_name(name: str, text: str) -> None:
    with pytest.raises(UserError, match=f"FINETUNE_{name}"):
        from_environment({f"FINETUNE_{name}": text})


def test_the_backend_is_one_of_those_that_there_are() -> None:
    assert from_environment({}).backend == "pytorchjob"
    assert from_environment({"FINETUNE_BACKEND": "trainjob"}).backend == "trainjob"
    with pytest.raises(UserError, match="FINETUNE_BACKEND must be pytorchjob or trainjob, not 'slurm'"):
        from_environment({"FINETUNE_BACKEND": "slurm"})
