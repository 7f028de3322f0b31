"""Questions to a model behind an OpenAI-compatible endpoint, each asked once: replies are kept on disk.

The address is $OPENAI_BASE_URL (without it, OpenAI's own), the key $OPENAI_API_KEY. The key goes into the request's
header and nowhere else: not into a file, an error or the log.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import httpx2
from tqdm import tqdm

from stages.lib.run.artefacts import write_json
from stages.lib.run.errors import UserError
from stages.lib.run.retry_after import retry_after

OPENAI = "https://api.openai.com/v1"
FIRST_WAIT = 1.0  # seconds before the first new try, doubled before each further one
LONGEST_WAIT = 120.0  # an endpoint that asks for more is asked again by the next run instead
PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}
KEPT = "the replies so far are kept, and the next run goes on from there"
LONGEST_QUOTE = 300  # characters of what an endpoint says about its refusal

Request = dict[str, Any]  # the body: model, messages, ...


class EndpointError(UserError):
    """The endpoint refused, could not be reached or is not what it should be."""


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and how patiently."""

    url: httpx2.URL  # of chat completions
    retries: int  # further tries after a passing fault
    timeout: float  # seconds without a byte

    @classmethod
    def from_environment(cls, retries: int, timeout: float) -> "Endpoint":
        """The endpoint of $OPENAI_BASE_URL.

        Raises:
            EndpointError: it is no http address, or holds a password.
        """
        advice = "set it to the address before /chat/completions, such as http://127.0.0.1:8000/v1"
        try:
            url = httpx2.URL(os.environ.get("OPENAI_BASE_URL", "").strip() or OPENAI)
        except httpx2.InvalidURL:
            raise EndpointError(f"OPENAI_BASE_URL is no address: {advice}") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise EndpointError(f"OPENAI_BASE_URL is no http address: {advice}")
        if url.userinfo:
            raise EndpointError("OPENAI_BASE_URL holds a user or a password: the key belongs in OPENAI_API_KEY")
        return cls(url.copy_with(path=url.path.rstrip("/") + "/chat/completions"), retries, timeout)

    @property
    def name(self) -> str:
        """For messages: the address without its query, which may carry a key."""
        return str(self.url.copy_with(query=None, fragment=None))


@dataclass(frozen=True)
class Reply:
    text: str  # '' where the model said nothing, or refused
    model: str | None  # what the endpoint calls the model that answered
    path: Path  # where request and reply are kept


def ask(
    requests: Sequence[Request], endpoint: Endpoint, folder: Path, parallel: int, progress: str
) -> tuple[list[Reply], int]:
    """The reply to every request, and how many were asked for now: equal requests once, those in `folder` not at all.

    A reply is kept as soon as it is there, under the SHA-256 of address and request, so that a run that was cut off
    goes on where it stood.

    Args:
        parallel: requests at a time.

    Raises:
        EndpointError: no key, or the endpoint refuses, cannot be reached or does not speak the protocol.
        UserError: a kept reply cannot be read.
    """
    paths = [folder / f"{_digest(endpoint, request)}.json" for request in requests]
    missing = {path: request for path, request in zip(paths, requests, strict=True) if not path.exists()}
    if missing:
        key, stop = read_key(), Event()
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        client = httpx2.Client(headers=headers, timeout=endpoint.timeout)

        def ask_and_keep(path: Path, request: Request) -> None:
            text, model = _ask_one(client, endpoint, request, key, stop)
            write_json(path, {"request": request, "reply": text, "model": model})

        with client, ThreadPoolExecutor(parallel) as pool:
            futures = [pool.submit(ask_and_keep, *item) for item in missing.items()]
            try:
                for future in tqdm(as_completed(futures), progress, len(futures), mininterval=1, unit=" replies"):
                    future.result()
            except BaseException:
                stop.set()  # those that wait for another try give up
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [_read(path) for path in paths], len(missing)


def read_key() -> str:
    """$OPENAI_API_KEY.

    Raises:
        EndpointError: it is not set, or nothing that a header can carry (such an error of the client would show it).
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        raise EndpointError(
            "OPENAI_API_KEY is not set: export the endpoint's key (any word for a server that asks for none), or set "
            "judge_responses.model to null"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise EndpointError("OPENAI_API_KEY holds a character that no key has: copy it anew")
    return key


def _digest(endpoint: Endpoint, request: Request) -> str:
    text = json.dumps({"url": str(endpoint.url), "request": request}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> Reply:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return Reply(kept["reply"], kept["model"], path)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no kept reply ({error}); delete it, and it is asked for again") from error


def _ask_one(
    client: httpx2.Client, endpoint: Endpoint, request: Request, key: str, stop: Event
) -> tuple[str, str | None]:
    """Text and model of one reply; tried again after what passes."""
    content = json.dumps(request).encode()
    for tried in range(endpoint.retries + 1):
        response, asked_to_wait = None, 0.0
        try:
            response = client.post(endpoint.url, content=content)
        except httpx2.RequestError as error:  # from None below: no address, it may carry a query
            problem = _unreachable(endpoint, error)
        else:
            if response.status_code == 200:
                return _parse(response, endpoint, key)
            problem = _refusal(response, endpoint, request, key)
            asked_to_wait = retry_after(response.headers)
        passing = response is None or response.status_code in PASSING
        if not passing or tried == endpoint.retries or asked_to_wait > LONGEST_WAIT:
            raise EndpointError(f"{problem}; {KEPT}")
        if stop.wait(max(asked_to_wait, min(FIRST_WAIT * 2**tried, LONGEST_WAIT))):
            raise CancelledError
    raise AssertionError("the last try returns or raises")


def _parse(response: httpx2.Response, endpoint: Endpoint, key: str) -> tuple[str, str | None]:
    try:
        body = response.json()
        text = body["choices"][0]["message"]["content"]
        if text is not None and not isinstance(text, str):
            raise TypeError("content is no text")
    except (ValueError, KeyError, IndexError, TypeError):
        raise EndpointError(
            f"{endpoint.name} answers, but not as chat completions do{_quote(response, key)}: check OPENAI_BASE_URL, "
            f"which mostly ends in /v1; {KEPT}"
        ) from None
    model = body.get("model")
    whole = (text or "").encode("utf-8", "replace").decode()  # half a surrogate pair fits into no file
    return whole, model if isinstance(model, str) else None


def _unreachable(endpoint: Endpoint, error: httpx2.RequestError) -> str:
    if isinstance(error, httpx2.ConnectError):
        return f"{endpoint.name}: no connection: start the server, or set OPENAI_BASE_URL to where it is"
    if isinstance(error, httpx2.TimeoutException):
        return f"{endpoint.name}: no answer within {endpoint.timeout:g} s: raise judge_responses.timeout"
    return f"{endpoint.name}: the connection broke ({type(error).__name__}): check the network and run again"


def _refusal(response: httpx2.Response, endpoint: Endpoint, request: Request, key: str) -> str:
    """One line: what was refused, the endpoint's own words unless they may show the key, what to do."""
    status = response.status_code
    quote = "" if status in (401, 403) else _quote(response, key)
    advice = {
        401: "it does not take the key in OPENAI_API_KEY: set the right one",
        403: "the key in OPENAI_API_KEY may not use it: choose another model in judge_responses.model, or another key",
        404: f"it has no model '{request['model']}', or is another address than OPENAI_BASE_URL says (mostly it ends "
        "in /v1): check judge_responses.model and OPENAI_BASE_URL",
        429: "too many requests or none left: lower judge_responses.parallel, wait a while, or look at the account",
    }.get(status)
    if advice is None and status >= 500:
        advice = "it has trouble: run again later"
    if advice is None:
        advice = "change judge_responses in params.yaml (temperature: null where a model takes only its own)"
    return f"{endpoint.name} answered {status}{quote}: {advice}"


def _quote(response: httpx2.Response, key: str) -> str:
    """' ("its own words")' of an error, cut, in one line and without the key; '' where it says nothing."""
    try:
        error = response.json()["error"]
        said = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError, IndexError):
        return ""
    said = " ".join(str(said).replace(key, "[the key]").split())
    said = "".join(character for character in said if character.isprintable())
    return f' ("{said[:LONGEST_QUOTE]}")' if said else ""
