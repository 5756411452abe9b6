"""Requests on a loopback server that answers as the API server does when it refuses."""

from __future__ import annotations

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from kubernetes.aio.client import ApiClient, Configuration

from finetune_operator.cluster.api import Api, ApiError


async def delete_answered_with(code: int) -> None:
    async def refuse(_: web.Request) -> web.Response:
        return web.json_response({"kind": "Status", "code": code, "reason": "Said"}, status=code)

    app = web.Application()
    app.router.add_delete("/{path:.*}", refuse)
    async with TestServer(app) as server, ApiClient(Configuration(host=str(server.make_url("")).rstrip("/"))) as client:
        await Api(client).delete("PyTorchJob", "ml", "support-train-1")


@pytest.mark.parametrize("code", [200, 404])
async def test_what_is_deleted_or_was_already_gone_is_deleted(code: int) -> None:
    await delete_answered_with(code)


@pytest.mark.parametrize("code", [409, 429, 500, 503])
async def test_a_deletion_that_was_refused_is_an_error_since_nothing_will_be_heard_of_it(code: int) -> None:
    with pytest.raises(ApiError) as refused:
        await delete_answered_with(code)
    assert refused.value.code == code
