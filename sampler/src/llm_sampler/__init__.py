"""Samples from any causal language model: a function from token ids to logits is all it needs."""

from ._asgi import asgi_app
from ._async import AsyncSteps, sample_async
from ._beam import Beam, beam_search
from ._best_of import best_of
from ._boundary import encode_choices
from ._constraints import choices, regex
from ._draft_model import DraftModel, DraftTree
from ._drafts import Draft, PromptLookup
from ._huggingface import from_huggingface
from ._perplexity import Perplexity, perplexity
from ._remote import RemoteError, from_url
from ._sample import Steps, generate, sample
from ._score import Choice, Score, multiple_choice, score
from ._server import serve
from ._stages import HUGGING_FACE_ORDER, LLAMA_CPP_ORDER
from ._stats import Stats
from ._step import Completion, Step
from ._text import Detokenizer, stream_text

__version__ = "0.1.0"
__all__ = [
    "HUGGING_FACE_ORDER",
    "LLAMA_CPP_ORDER",
    "AsyncSteps",
    "Beam",
    "Choice",
    "Completion",
    "Detokenizer",
    "Draft",
    "DraftModel",
    "DraftTree",
    "Perplexity",
    "PromptLookup",
    "RemoteError",
    "Score",
    "Stats",
    "Step",
    "Steps",
    "asgi_app",
    "beam_search",
    "best_of",
    "choices",
    "encode_choices",
    "from_huggingface",
    "from_url",
    "generate",
    "multiple_choice",
    "perplexity",
    "regex",
    "sample",
    "sample_async",
    "score",
    "serve",
    "stream_text",
]
