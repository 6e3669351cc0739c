"""One comment under a pull request, found again by its hidden tag. HTTP is a function, so that this is tested without a network."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from typing import Any

from meshwright.planner.check import CheckReport
from meshwright.profiling.errors import InputError
from meshwright.report.check_markdown import hidden_tag, render_markdown

# (method, url, headers, body) -> (status, text)
Http = Callable[[str, str, dict[str, str], bytes | None], tuple[int, str]]
BEHAVIORS = ("update", "new")
PAGE, PAGES = 100, 30


def post(
    report: CheckReport, *, repo: str, number: int, api: str, token: str, http: Http, behavior: str = "update", tag: str = ""
) -> str:
    """Posts or updates the comment, and says which. Nothing is posted where nothing changed and there is no earlier comment.

    GitHub REST: GET and POST /repos/{repo}/issues/{number}/comments, PATCH /repos/{repo}/issues/comments/{id}. InputError for
    what is missing or refused.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise InputError(f"--repo {repo!r} must be owner/name")
    if number < 1:
        raise InputError("--pull-request must be the number of a pull request")
    if not re.match(r"https?://", api):
        raise InputError("GITHUB_API_URL must be set to the address of GitHub's API, as it is in Actions")
    if not token or not (token.isascii() and token.isprintable()):
        raise InputError("GITHUB_TOKEN must be set to a token with the permission pull-requests: write")
    headers = {"Authorization": f"Bearer {token}", "Accept": "application/vnd.github+json", "X-GitHub-Api-Version": "2022-11-28",
               "User-Agent": "meshwright", "Content-Type": "application/json"}  # fmt: skip

    def call(method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        status, text = http(method, f"{api.rstrip('/')}/repos/{repo}/{path}", headers, json.dumps(body).encode() if body else None)
        if not 200 <= status < 300:
            hint = ": the token needs the permission pull-requests: write" if status in (401, 403) else ""
            raise InputError(f"GitHub answered {status} to {method} /repos/{repo}/{path.partition('?')[0]}{hint}")
        try:
            return json.loads(text)
        except ValueError:
            raise InputError(f"GitHub's answer to {method} /repos/{repo}/{path.partition('?')[0]} is not JSON") from None

    earlier = _earlier(call, number, hidden_tag(tag))
    if report.same_as_base and earlier is None:
        return "Nothing changed against the base, and there is no earlier comment: nothing was posted"
    body = {"body": render_markdown(report, tag)}
    if earlier is not None and behavior == "update":
        call("PATCH", f"issues/comments/{earlier}", body)
        return f"Updated comment {earlier} of pull request {number}"
    made = call("POST", f"issues/{number}/comments", body)
    return f"Posted comment {made.get('id') if isinstance(made, dict) else ''} under pull request {number}"


def _earlier(call: Callable[..., Any], number: int, mark: str) -> int | None:
    """The id of the latest comment with our tag."""
    found = None
    for page in range(1, PAGES + 1):
        listed = call("GET", f"issues/{number}/comments?per_page={PAGE}&page={page}")
        if not isinstance(listed, list):
            break
        for c in listed:
            if isinstance(c, dict) and isinstance(c.get("id"), int) and str(c.get("body", "")).rstrip().endswith(mark):
                found = c["id"]
        if len(listed) < PAGE:
            break
    return found


def over_https(method: str, url: str, headers: dict[str, str], body: bytes | None) -> tuple[int, str]:
    """One request. A refusal is its status; InputError if there is no answer."""
    try:
        request = urllib.request.Request(url, data=body, headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status), answer.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode("utf-8", "replace")
    except OSError as e:
        raise InputError(f"GitHub's API does not answer: {getattr(e, 'reason', e)}") from None
    except (ValueError, HTTPException) as e:  # an address or an answer that is none; its text may hold the token
        raise InputError(f"GitHub's API cannot be asked at that address: {type(e).__name__}") from None
