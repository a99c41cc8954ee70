"""When an output ends: one rule for the first token, which prefill draws, and for all others, which decode draws."""

from __future__ import annotations

from collections.abc import Collection

from protocol.messages import Sampling


def finish_reason(
    token_id: int, *, num_output: int, num_tokens: int, sampling: Sampling, eos_token_ids: Collection[int], max_model_len: int
) -> str:
    """Why the output ends with this token: "stop", "length", or "" when it does not.

    Args:
        num_output: output tokens, this one counted.
        num_tokens: prompt and output tokens, this one counted.
    """
    if token_id in sampling.stop_token_ids or (token_id in eos_token_ids and not sampling.ignore_eos):
        return "stop"
    if num_output >= sampling.max_tokens or num_tokens >= max_model_len:
        return "length"
    return ""
