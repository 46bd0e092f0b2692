"""Which names of the server are let through.

A web page elsewhere can have its own name lead to this machine, and then call the server from a visitor's browser (DNS
rebinding). The Host header then has that page's name.
"""

from __future__ import annotations

from collections.abc import Collection

from medusa_serve.errors import ApiError


def check_host(header: str | None, trusted: Collection[str] | None) -> None:
    """Refuse a request for a host that is not trusted.

    Args:
        header: the request's header Host.
        trusted: host names, in lower case. ``*.example.com`` stands for all names below that one; None for all there are.

    Raises:
        ApiError: the host is not trusted.
    """
    if trusted is None:
        return
    name = host_name(header or "")
    if name in trusted or any(one.startswith("*.") and name.endswith(one[1:]) for one in trusted):
        return
    raise ApiError(
        400, f"the host {name[:80]!r} is not served here; the operator can allow it with --trusted-host", code="unknown_host"
    )


def host_name(header: str) -> str:
    """The name of a Host header, without the port."""
    header = header.strip().lower()
    if header.startswith("["):  # an IPv6 address
        return header[1:].partition("]")[0]
    return header.partition(":")[0]
