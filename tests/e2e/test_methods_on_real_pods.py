"""Every way of tuning runs in the image as it is shipped, over more than one pod."""

from __future__ import annotations

from typing import Any

import pytest

from .place import Place

METHODS: dict[str, dict[str, Any]] = {
    "qlora": {"tuning": {"method": "qlora", "lora": {"rank": 16, "alpha": 32}}},
    "full": {"tuning": {"method": "full"}, "training__learningRate": 2.0e-3},
}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_over_two_pods_and_the_model_is_better(place: Place, method: str) -> None:
    place.apply(publish=None, topology={"nodes": 2, "gpusPerNode": 0}, **METHODS[method])
    status = place.complete()
    (metric,) = [m for m in status["results"]["metrics"] if (m["dataset"], m["metric"]) == ("days", "accuracy")]
    assert metric["difference"]["low"] > 0
    assert status["results"]["exportDigest"] == status["export"]["digest"]
