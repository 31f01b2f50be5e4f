"""Uploads that survive a SuperLink stopping in the middle of them.

If a response is lost, Flower retries and then treats an object as rejected that the first request had already stored.
"""

from __future__ import annotations

from flwr.proto.message_pb2 import PullObjectRequest, PushObjectRequest, PushObjectResponse
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.fleet_http_client import FleetHttpClient


def believe(client: type[RuntimeHttpClient] | type[FleetHttpClient]) -> None:
    """Makes a client class check whether an object that was not stored is already there; its name is its hash."""
    push = client.PushObject

    def look(self: RuntimeHttpClient | FleetHttpClient, request: PushObjectRequest) -> PushObjectResponse:
        answer = push(self, request)
        if not answer.stored:
            asked = PullObjectRequest(node=request.node, run_id=request.run_id, object_id=request.object_id)
            answer.stored = self.PullObject(asked).object_available
        return answer

    setattr(client, "PushObject", look)  # noqa: B010
