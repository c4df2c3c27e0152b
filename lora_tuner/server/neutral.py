"""Values of request fields that change no output: accepted, as many clients send all their defaults.

Null stands for an omitted field, of any name. Every other value of these fields is refused by name.
docs/serving.md lists them all.
"""

import json
from collections.abc import Mapping

# Field -> its neutral values beside null; None: every value.
Neutral = Mapping[str, tuple[object, ...] | None]

REQUEST: Neutral = {
    # OpenAI
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logprobs": (False,),
    "metadata": None,
    "modalities": (["text"],),
    "prediction": (),
    "prompt_cache_key": None,
    "prompt_cache_retention": None,
    "reasoning_effort": ("none",),
    "safety_identifier": None,
    "service_tier": ("auto", "default"),
    "store": None,
    "suffix": ("",),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM
    "allowed_token_ids": (),
    "bad_words": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "early_stopping": (False,),
    "guided_decoding_backend": None,
    "include_reasoning": None,
    "length_penalty": (1,),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "session_id": None,
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": None,
    "top_k": (-1,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    # llama.cpp and its relatives; the settings of a sampler that is off have no effect
    "cache_prompt": None,
    "dry_allowed_length": None,
    "dry_base": None,
    "dry_multiplier": (0,),
    "dry_penalty_last_n": None,
    "dry_sequence_breakers": None,
    "dynatemp_exponent": None,
    "dynatemp_range": (0,),
    "grammar": ("",),
    "id_slot": None,
    "lora": ([],),
    "min_keep": (0,),
    "mirostat": (0,),
    "mirostat_eta": None,
    "mirostat_mode": (0,),
    "mirostat_tau": None,
    "n_keep": (0,),
    "n_predict": (-1,),
    "n_probs": (0,),
    "post_sampling_probs": (False,),
    "repeat_last_n": None,
    "repeat_penalty": (1,),
    "return_tokens": (False,),
    "tfs_z": (1,),
    "timings_per_token": (False,),
    "top_a": (0,),
    "top_n_sigma": (-1, 0),
    "typical_p": (1,),
    "xtc_probability": (0,),
    "xtc_threshold": None,
    # Mistral, OpenRouter
    "plugins": ([],),
    "safe_prompt": (False,),
    "transforms": ([],),
}
COMPLETION: Neutral = {
    **REQUEST,
    "add_special_tokens": (True,),
    "parallel_tool_calls": None,
    "tool_choice": ("none", "auto"),
}
CHAT: Neutral = {
    **REQUEST,
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),  # the template writes them
    "echo": (False,),
    "max_completion_tokens": (-1,),
    "max_tokens": (-1,),  # as many as fit, which is the default
}
TOKENIZE: Neutral = {
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "mm_processor_kwargs": ({},),
    "tools": ([],),
}
CLASSIFY: Neutral = {
    "activation": (True,),
    "add_special_tokens": (True,),
    "priority": (0,),
    "softmax": (True,),
    "truncate_prompt_tokens": (-1,),
    "use_activation": (True,),
}
RESPONSES: Neutral = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "frequency_penalty": (0,),
    "include": ([],),
    "max_tool_calls": None,
    "parallel_tool_calls": None,
    "presence_penalty": (0,),
    "previous_response_id": (),
    "prompt": (),
    "prompt_cache_key": None,
    "prompt_cache_options": None,
    "prompt_cache_retention": None,
    "reasoning": ({}, {"effort": None}, {"effort": "none"}, {"effort": None, "summary": None}),
    "safety_identifier": None,
    "service_tier": ("auto", "default"),
    "store": None,
    "stream_options": ({}, {"include_obfuscation": False}),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
INPUT_MESSAGE: Neutral = {"id": None, "phase": None, "status": None}  # as they came in an output
INPUT_PART: Neutral = {"annotations": ([],), "logprobs": ([],)}
TEXT_SETTINGS: Neutral = {"verbosity": ("medium",)}
LOAD_ADAPTER: Neutral = {"base_model_name": (), "load_inplace": None}  # changed files are read again
UNLOAD_ADAPTER: Neutral = {"lora_int_id": None}
STREAM_OPTIONS: Neutral = {"include_obfuscation": (False,)}
MESSAGE: Neutral = {  # as clients send back what some server answered
    "annotations": ([],),
    "audio": (),
    "cache_control": None,
    "function_call": (),
    "id": None,
    "images": ([],),
    "prefix": (False,),
    "provider_specific_fields": None,
    "reasoning": ("",),
    "reasoning_content": ("",),
    "reasoning_details": ([],),
    "refusal": ("",),
    "thinking_blocks": ([],),
    "tool_calls": ([],),
}
TOOL_CALL: Neutral = {"index": None, "provider_specific_fields": None}
CONTENT_PART: Neutral = {
    "annotations": ([],),
    "cache_control": None,
    "file": (),
    "image_url": (),
    "input_audio": (),
}
STRUCTURED_OUTPUTS: Neutral = {
    "disable_additional_properties": (False,),
    "disable_any_whitespace": None,  # JSON never has more than a space here
    "disable_fallback": None,
    "structural_tag": (),
    "whitespace_pattern": (),
}
NESTED: Neutral = {
    **STREAM_OPTIONS,
    **STRUCTURED_OUTPUTS,
    **CONTENT_PART,
    **TOOL_CALL,
    **MESSAGE,
    **INPUT_MESSAGE,
    **INPUT_PART,
    **TEXT_SETTINGS,
}


def is_neutral(fields: Neutral, name: str, value: object) -> bool:
    """Return True if the value of a field changes no output."""
    neutral = fields.get(name, ())
    # Python takes False for 0, JSON does not.
    return (
        value is None
        or neutral is None
        or any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral)
    )


def json_schema(fields: Neutral, properties: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    """Return the properties of a JSON schema with the neutral values added."""
    merged = dict(properties)
    for name, neutral in fields.items():
        values: dict[str, object] = {} if neutral is None else {"enum": [*neutral, None]}
        merged[name] = {"anyOf": [properties[name], values]} if name in properties else values
    return merged


def refusal(fields: Neutral, name: str) -> str:
    """Describe the problem of a field that no schema has, or whose value is not neutral."""
    if name not in fields:
        return "unknown field"
    values = " or ".join(json.dumps(value) for value in fields[name] or ())
    return f"not supported: leave it out{f', or send {values}' if values else ''}"
