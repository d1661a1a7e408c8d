"""The generation options that are refused by name, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from graphwright.ir.errors import InputError, UnsupportedGenerationError

_SPECULATE = "speculation is part of the program: optimize with the pass speculate{drafter=ngram}"
_STOCK = "use the stock model's generate() for this option"
_CACHE = "the program has a cache of its own; leave this option out"


def _given(value: Any) -> bool:
    return value is not None and value is not False


def _many(value: Any) -> bool:
    return value is not None and value != 1


# Option of GenerationConfig -> (is it in use?, what to do instead).
_CONFIG: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_beams": (_many, "beam search is not supported: set num_beams=1"),
    "num_beam_groups": (_many, "beam search is not supported: set num_beam_groups=1"),
    "constraints": (_given, "constrained beam search is not supported"),
    "force_words_ids": (_given, "constrained beam search is not supported"),
    "dola_layers": (_given, _STOCK),
    "prompt_lookup_num_tokens": (_given, _SPECULATE),
    "assistant_early_exit": (_given, _SPECULATE),
    "assistant_ensemble_weight": (_given, "it mixes the assistant's distribution into the output; " + _STOCK),
    "use_mtp": (_given, _SPECULATE),
    "speculation_type": (_given, _SPECULATE),
    "is_assistant": (_given, "a program cannot be an assistant of another model's generate()"),
    "guidance_scale": (_many, "classifier-free guidance runs the model inside a logits processor; " + _STOCK),
    "token_healing": (_given, "heal the prompt's tokens before generate()"),
    "use_cache": (lambda value: value is False, "a program always decodes with its cache"),
    "cache_implementation": (_given, _CACHE),
    "cache_config": (_given, _CACHE),
    "prefill_chunk_size": (_given, "the program chunks long prompts itself"),
    "compile_config": (_given, "the program is already compiled"),
    "low_memory": (_given, _STOCK),
    "output_attentions": (_given, "attention weights are never materialized; " + _STOCK),
    "output_hidden_states": (_given, "hidden states stay inside the compiled program; " + _STOCK),
}

# Argument of generate() or forward() -> what to do instead.
_ARGUMENTS: dict[str, str] = {
    "negative_prompt_ids": "classifier-free guidance is not supported; " + _STOCK,
    "negative_prompt_attention_mask": "classifier-free guidance is not supported; " + _STOCK,
    "custom_generate": "the program has its own decoding loop; " + _STOCK,
    "trust_remote_code": "graphwright never runs remote code",
    "synced_gpus": "a program runs on one device",
    "inputs_embeds": "pass input_ids",
    "past_key_values": "generate() starts from token ids; continue a sequence by passing all of its tokens",
    "encoder_outputs": "graphwright compiles decoder-only models",
    "encoder_hidden_states": "graphwright compiles decoder-only models",
    "encoder_attention_mask": "graphwright compiles decoder-only models",
    "decoder_input_ids": "graphwright compiles decoder-only models; pass input_ids",
    "decoder_attention_mask": "graphwright compiles decoder-only models; pass attention_mask",
    "token_type_ids": "the program was captured without token types; drop them from the tokenizer's output",
    "head_mask": _STOCK,
    "pixel_values": "graphwright compiles text models",
    "output_attentions": "attention weights are never materialized; " + _STOCK,
    "output_hidden_states": "hidden states stay inside the compiled program; " + _STOCK,
    "output_router_logits": _STOCK,
    "cache_implementation": _CACHE,
    "cache_position": "positions follow from the attention mask and the cache; leave it out",
}


def refuse(name: str, value: Any, hint: str, where: str) -> UnsupportedGenerationError:
    """The error for option ``name``."""
    shown = repr(value) if isinstance(value, (bool, int, float, str)) else type(value).__name__
    return UnsupportedGenerationError(f"{name}={shown} is not supported", where=where, hint=hint)


def check_config(config: Any, where: str = "generate") -> None:
    """Refuse what a merged ``GenerationConfig`` asks for and the loop does not do.

    Raises:
        UnsupportedGenerationError: names the option.
    """
    for name, (used, hint) in _CONFIG.items():
        value = getattr(config, name, None)
        if used(value):
            raise refuse(name, value, hint, where)
    alpha = getattr(config, "penalty_alpha", None)
    if alpha is not None and alpha > 0 and not config.do_sample:
        raise refuse("penalty_alpha", alpha, "contrastive search is not supported; " + _STOCK, where)


def check_arguments(arguments: Mapping[str, Any], where: str) -> None:
    """Refuse the arguments of a call that are known and not supported; others pass.

    Raises:
        UnsupportedGenerationError: names the argument.
    """
    for name, hint in _ARGUMENTS.items():
        if _given(arguments.get(name)):
            raise refuse(name, arguments[name], hint, where)


def check_leftovers(arguments: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    """Refuse every argument that is neither known nor None: misspelled options end here.

    Raises:
        UnsupportedGenerationError: the argument is a known one that is not supported.
        InputError: nobody knows the argument.
    """
    check_arguments(arguments, where)
    unknown = sorted(name for name, value in arguments.items() if _given(value) and name not in known)
    if unknown:
        raise InputError(
            f"unknown argument{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}",
            where=where,
            hint="check the spelling; options of GenerationConfig can be passed as keywords",
        )
