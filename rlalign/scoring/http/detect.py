"""dialect="auto": which language a server speaks, from what it says of itself; never from how it answers a wrong request."""

from __future__ import annotations

from rlalign.scoring.http.dialect import Ask, Dialect
from rlalign.scoring.http.sglang_dialect import OURS, SGLangDialect
from rlalign.scoring.http.text_dialects import InfinityDialect, OpenRLHFDialect, TEIDialect
from rlalign.scoring.http.transport import Call, Json, RequestFailed
from rlalign.scoring.http.vllm_dialect import VLLMDialect

DIALECTS: dict[str, type[Dialect]] = {
    "vllm": VLLMDialect,
    "sglang": SGLangDialect,
    "tei": TEIDialect,
    "infinity": InfinityDialect,
    "openrlhf": OpenRLHFDialect,
}


def detect(ask: Ask) -> str:
    """The dialect's name. Raises ValueError where the server could be several, or none that is known."""
    owners = {str(card.get("owned_by")) for card in _cards(ask, "/v1/models")}
    owners |= {str(card.get("owned_by")) for card in _cards(ask, "/models")}
    found = {owner for owner in ("vllm", "sglang", "infinity") if owner in owners}
    found |= {"sglang"} if OURS in owners else set()
    stated = _optional(ask, "/info")
    if isinstance(stated, dict) and {"model_id", "model_type", "max_client_batch_size"} <= stated.keys():
        found.add("tei")
    if not found:
        paths = _optional(ask, "/openapi.json")
        if isinstance(paths, dict) and "/get_reward" in (paths.get("paths") or {}):
            found.add("openrlhf")
    if len(found) != 1:
        raise ValueError(
            f"the server speaks {'none of' if not found else 'more than one of'} {', '.join(sorted(found or DIALECTS))}, "
            f"by what it says of itself: choose one with dialect="
        )
    return found.pop()


def _cards(ask: Ask, path: str) -> list[dict[str, object]]:
    body = _optional(ask, path)
    listed = body.get("data") if isinstance(body, dict) else None
    return [card for card in listed if isinstance(card, dict)] if isinstance(listed, list) else []


def _optional(ask: Ask, path: str) -> Json | None:
    """The JSON of a page, None where the server has no such page. A server that cannot be reached is an error."""
    try:
        return ask(Call(path=path))
    except RequestFailed as error:
        if error.status is None or error.status in (401, 403, 429) or error.status >= 500:
            raise
        return None
