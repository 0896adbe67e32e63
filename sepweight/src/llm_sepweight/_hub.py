"""Models on the Hugging Face hub, which is a web server that does ranges once it has told the commit."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import httpx2
import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers

from llm_sepweight._errors import WeightError
from llm_sepweight._http import FAILING, PASSING, HttpRemote, passing
from llm_sepweight._remote import PassingError, patiently, words


class HubRemote(HttpRemote):
    """A model on the Hugging Face hub, hf://owner/name or hf://owner/name@revision, at one commit."""

    def __init__(self, uri: str, headers: Mapping[str, str], *, timeout: float, retries: int) -> None:
        try:
            repo = huggingface_hub.parse_hf_uri(uri)
            if repo.type != "model" or repo.path_in_repo:
                raise ValueError("a model is needed, as in hf://owner/name or hf://owner/name@revision")
        except ValueError as error:
            raise _not_found(uri, error) from error
        info = patiently(
            lambda: _model_info(uri, repo.id, repo.revision, timeout),
            retries=retries,
            stopped=threading.Event(),
            name=uri,
        )
        self._names = [file.rfilename for file in info.siblings or []]
        probe = huggingface_hub.hf_hub_url(repo.id, "x", revision=info.sha)
        url = probe.removesuffix("/x")
        super().__init__(url, {**build_hf_headers(), **headers}, timeout=timeout, retries=retries)
        self.name = f"hf://{repo.id}@{info.sha}"

    def names(self) -> Sequence[str]:
        return self._names

    def _remedy(self, status: int) -> str:
        if status in (401, 403):
            return "Ask for access on the model's page, and set HF_TOKEN."
        return super()._remedy(status)


def _model_info(uri: str, repo: str, revision: str | None, timeout: float) -> huggingface_hub.ModelInfo:
    try:
        return huggingface_hub.HfApi().model_info(repo, revision=revision, timeout=timeout)
    except FAILING as error:
        raise PassingError(f"the connection to the hub failed: {words(error)}", file=uri) from error
    except (httpx2.HTTPError, OSError, ValueError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in PASSING:
            raise passing(f"the hub answers: {words(error)}", uri, error.response) from error
        raise _not_found(uri, error) from error


def _not_found(uri: str, error: Exception) -> WeightError:
    remedy = "Check the name; for a private or gated model set HF_TOKEN."
    return WeightError(f"the model cannot be found on the hub: {words(error)}", file=uri, remedy=remedy)
