"""What the Hub answered, inside what its client made of it: Prepare and Publish read the same errors."""

from __future__ import annotations

import httpx2
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled


def root_of(error: BaseException) -> BaseException:
    """The Hub's or the network's own answer in the chain of causes (uploads end in a RuntimeError); else the error."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, HfHubHTTPError | httpx2.HTTPError | OfflineModeIsEnabled):
            return seen
        seen = seen.__cause__ or seen.__context__
    return error


def status_of(error: BaseException) -> int | None:
    """The HTTP status that came with the error, if one did."""
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def first_line(error: BaseException) -> str:
    """The first line of what the error says, or its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
