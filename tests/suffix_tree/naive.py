"""The naive model of a suffix cache: lists of tokens, searched from end to end."""

from __future__ import annotations

from dataclasses import dataclass, field

TAIL = 8


@dataclass
class NaiveRequest:
    tenant: str
    text: list[int]
    cached: bool


@dataclass
class NaiveCache:
    """Which texts a request may draft from, and what it must find there."""

    requests: dict[str, NaiveRequest] = field(default_factory=dict)
    responses: dict[tuple[str, str], list[int]] = field(default_factory=dict)  # tail and response
    tails: dict[tuple[str, str], int] = field(default_factory=dict)  # leading tokens that are context only

    def start(self, request_id: str, prompt: list[int], tenant: str) -> None:
        self.requests[request_id] = NaiveRequest(tenant, list(prompt), True)
        self.responses[tenant, request_id] = prompt[-TAIL:]
        self.tails[tenant, request_id] = len(prompt[-TAIL:]) - 1

    def extend(self, request_id: str, new: list[int]) -> None:
        request = self.requests[request_id]
        request.text += new
        if request.cached:
            self.responses[request.tenant, request_id] += new

    def finish(self, request_id: str) -> None:
        del self.requests[request_id]

    def insert(self, key: str, tokens: list[int], tenant: str) -> None:
        self.responses[tenant, key] = list(tokens)
        self.tails[tenant, key] = 0

    def forget(self, key: str, tenant: str) -> None:
        del self.responses[tenant, key]
        request = self.requests.get(key)
        if request is not None and request.tenant == tenant:
            request.cached = False

    def forget_tenant(self, tenant: str) -> None:
        for key in [key for key in self.responses if key[0] == tenant]:
            del self.responses[key]
        for request in self.requests.values():
            if request.tenant == tenant:
                request.cached = False

    def occurrences(self, request_id: str) -> list[tuple[int, list[int], bool]]:
        """(match length, continuation, searchable) of every earlier place that ends in the request's last token.

        A request sees its own text and the other responses of its tenant. All but the last token of a response's
        prompt tail are context only: a match may run into them, but a search does not begin there.
        """
        request = self.requests[request_id]
        texts = [(request.text, 0)]
        for (tenant, key), text in self.responses.items():
            if tenant == request.tenant and key != request_id:
                texts.append((text, self.tails[tenant, key]))
        found = []
        for text, first in texts:
            for end in range(len(text) - 1):
                length = 0
                while length <= end and length < len(request.text) and text[end - length] == request.text[-1 - length]:
                    length += 1
                if length:
                    found.append((length, text[end + 1 :], end >= first))
        return found
