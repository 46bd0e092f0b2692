"""The items of a response: reasoning, messages and calls of functions, while they come and when they are done."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from medusa_serve.parsing import Delta

Event = dict[str, Any]
PARTS = {"message": "output_text", "reasoning": "reasoning_text"}  # the part that holds an item's text
DELTAS = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}


class Items:
    """Makes items of the deltas of one answer. Each method gives the events that tell of the change.

    Args:
        name: the ids of the items are made from it.
    """

    def __init__(self, name: str) -> None:
        self.done: list[dict[str, Any]] = []
        self.has_calls = False
        self._name = name
        self._open: dict[str, Any] | None = None
        self._text = ""  # of the open item
        self._call = -1  # the number of the open call

    def push(self, delta: Delta) -> Iterator[Event]:
        """Add what a delta brings."""
        for kind, text in (("reasoning", delta.reasoning), ("message", delta.content)):
            if text:
                yield from self._begin(kind)
                yield from self._add(text)
        for call in delta.tool_calls:
            if call.index != self._call or self._kind != "function_call":
                self._call, self.has_calls = call.index, True
                yield from self._begin("function_call", call_id=call.id, name=call.name, arguments="")
            if call.arguments:
                yield from self._add(call.arguments)

    def close(self, status: str) -> Iterator[Event]:
        """End the open item, if there is one. status: completed or incomplete."""
        if self._open is None:
            return
        item, kind, where = self._open, self._kind, self._where
        if kind == "function_call":
            item["arguments"] = self._text
            yield {"type": f"{DELTAS[kind]}.done", **where, "arguments": self._text, "name": item["name"]}
        else:
            part = self._part(self._text)
            item["content"] = [part]
            logprobs: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
            yield {"type": f"{DELTAS[kind]}.done", **where, "content_index": 0, "text": self._text, **logprobs}
            yield {"type": "response.content_part.done", **where, "content_index": 0, "part": part}
        item["status"] = status
        yield {"type": "response.output_item.done", "output_index": len(self.done), "item": item}
        self.done.append(item)
        self._open = None

    @property
    def _kind(self) -> str:
        return "" if self._open is None else str(self._open["type"])

    @property
    def _where(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self.done)}

    def _begin(self, kind: str, **fields: Any) -> Iterator[Event]:
        """Open an item, unless the open one is of this kind and more of it has come."""
        if self._kind == kind and kind != "function_call":
            return
        yield from self.close("completed")
        place, self._text = len(self.done), ""
        item: dict[str, Any] = {"id": f"{kind[:3]}_{self._name}_{place}"[:128], "type": kind, "status": "in_progress"}
        item.update(fields)
        if kind == "message":
            item["role"] = "assistant"
        if kind == "reasoning":
            item["summary"] = []
        if kind != "function_call":
            item["content"] = []
        self._open = item
        yield {"type": "response.output_item.added", "output_index": place, "item": dict(item)}
        if kind != "function_call":
            yield {"type": "response.content_part.added", **self._where, "content_index": 0, "part": self._part("")}

    def _add(self, text: str) -> Iterator[Event]:
        self._text += text
        told: dict[str, Any] = {} if self._kind == "function_call" else {"content_index": 0}
        logprobs: dict[str, Any] = {"logprobs": []} if self._kind == "message" else {}
        yield {"type": f"{DELTAS[self._kind]}.delta", **self._where, **told, "delta": text, **logprobs}

    def _part(self, text: str) -> dict[str, Any]:
        kind = PARTS[self._kind]
        part: dict[str, Any] = {"type": kind, "text": text}
        if kind == "output_text":
            part |= {"annotations": [], "logprobs": []}
        return part
