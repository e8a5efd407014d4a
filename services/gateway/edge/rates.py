"""What a client is told of its limits: `X-RateLimit-*`, with the names and forms of OpenAI's API.

For each of `requests`, `tokens` (per minute) and `concurrency`, the tightest of the key's, the project's and the tenant's limits:
`x-ratelimit-limit-<kind>`, `x-ratelimit-remaining-<kind>`, and for rates `x-ratelimit-reset-<kind>`, the time until the whole limit is
there again (`0s`, `31.5s`). What other gateways have spent is known as of this one's last refill.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.gateway.leases import Standing


def rate_head(standings: Sequence[Standing]) -> bytes:
    """Header lines; empty where nothing is limited."""
    lines = []
    for standing in standings:
        kind = standing.kind
        lines.append(f"x-ratelimit-limit-{kind}: {standing.limit}\r\nx-ratelimit-remaining-{kind}: {standing.remaining}\r\n")
        if standing.reset is not None:
            lines.append(f"x-ratelimit-reset-{kind}: {round(standing.reset, 3):g}s\r\n")
    return "".join(lines).encode()
