"""Which prompt goes before a text, decided as sentence-transformers decides it.

Source: ``_resolve_prompt``, ``encode_query`` and ``encode_document`` of sentence-transformers 6.2,
where every model has the prompts ``query`` and ``document``, empty unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping

from sbert_pg.errors import EncodingError

QUERY = "query"
DOCUMENT = "document"


def resolve_prompt(
    prompts: Mapping[str, str],
    default_prompt_name: str | None,
    prompt_name: str | None,
    prompt: str | None,
) -> str:
    """The text to put before every text of a call, empty for none.

    Args:
        prompts: the encoder's prompts.
        default_prompt_name: name of the prompt used where neither argument is given.
        prompt_name: name asked for.
        prompt: text asked for; it wins.

    Raises:
        EncodingError: there is no prompt of that name.
    """
    if prompt is not None:
        return prompt
    if prompt_name is None:
        return prompts.get(default_prompt_name, "") if default_prompt_name else ""
    if prompt_name in prompts:
        return prompts[prompt_name]
    if prompt_name in (QUERY, DOCUMENT):
        return ""
    raise EncodingError(
        f"There is no prompt named {prompt_name!r}; this encoder has "
        f"{', '.join(sorted({*prompts, QUERY, DOCUMENT}))}. Pass the text itself as prompt=."
    )
