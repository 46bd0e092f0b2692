"""What the operator of a server may choose. Each field is also a flag of `medusa-export serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

MEGABYTE = 1 << 20
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class ServerSettings(BaseModel):
    """How a server listens, what it lets through, and how long it waits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 for any free one")
    uds: Path | None = Field(None, description="listen on this Unix socket instead, which this user alone may open")
    root_path: str = Field("", description="path under which a proxy shows the server, such as /medusa")
    served_model_name: tuple[str, ...] = Field(
        (), description="name by which requests ask for the model; omit for the bundle's own"
    )
    api_key_file: Path | None = Field(None, description="file with API keys, one a line; requests to the API need one of them")
    trusted_host: tuple[str, ...] = Field(
        (),
        description="Host header that is let through; omit for localhost alone if the address is its own, else for any",
    )
    cors_origin: tuple[str, ...] = Field((), description="origin of web pages that may call the API; omit for none")
    max_body_bytes: int = Field(4 * MEGABYTE, ge=1024, description="the longest body of a request")
    max_prompt_tokens: int | None = Field(None, ge=1, description="the longest prompt; omit for the model's own limit")
    max_connections: int = Field(1024, ge=1, description="connections at a time")
    header_seconds: float = Field(10.0, gt=0, description="how long a client may take to send the head of a request")
    idle_seconds: float = Field(
        30.0, gt=0, description="how long a client may send nothing, or read nothing, before it is cut off"
    )
    grace: float = Field(30.0, ge=0, description="seconds that requests under way have to end after SIGTERM")
    tool_format: Literal["auto", "hermes", "llama3", "mistral", "none"] = Field(
        "auto", description="how the model writes calls of tools; auto guesses it from the chat template"
    )
    reasoning_format: Literal["auto", "think", "mistral", "none"] = Field(
        "auto", description="how the model marks its reasoning; auto guesses it from the chat template"
    )
    special_tokens_in_text: bool = Field(
        False, description="let text in requests that is spelled like a special token become one"
    )
    page: bool = Field(True, description="show the page at /")
    access_log: str = Field("-", description="where a line of JSON for each request goes: - for stdout, a file, or off")
    log_texts: bool = Field(False, description="write prompts and answers into the access log")
    otel: bool = Field(False, description="send OpenTelemetry traces; the OTEL_* variables say where to")

    @property
    def is_local(self) -> bool:
        """Whether other machines cannot reach it."""
        return self.uds is not None or self.host in LOOPBACK

    @property
    def trusted_hosts(self) -> frozenset[str] | None:
        """Host headers that are let through, without ports; None for all of them."""
        if "*" in self.trusted_host:
            return None
        if self.trusted_host:
            return frozenset(name.lower() for name in self.trusted_host)
        return frozenset(LOOPBACK) if self.is_local and self.uds is None else None
