"""The inputs and outputs of the model. The names are those of Triton's vLLM and TensorRT-LLM backends, for their clients."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as the model's configuration declares it. Every input is optional."""

    name: str
    data_type: str  # as Triton names it
    about: str
    is_list: bool = False  # it may have any number of values; else it has one


SAMPLING_INPUTS = (  # TensorRT-LLM's; `sampling_parameters` has the same options and more
    TensorSpec("max_tokens", "TYPE_INT32", "the most tokens of an answer"),
    TensorSpec("min_tokens", "TYPE_INT32", "the fewest tokens of an answer"),
    TensorSpec("temperature", "TYPE_FP32", "0 is greedy"),
    TensorSpec("top_k", "TYPE_INT32", "sample from this many likely tokens"),
    TensorSpec("top_p", "TYPE_FP32", "sample from the fewest tokens that have this probability together"),
    TensorSpec("repetition_penalty", "TYPE_FP32", "for tokens in prompt or answer"),
    TensorSpec("presence_penalty", "TYPE_FP32", "for tokens in the answer"),
    TensorSpec("frequency_penalty", "TYPE_FP32", "for each time a token is in the answer"),
    TensorSpec("seed", "TYPE_UINT64", "of the random numbers"),
    TensorSpec("stop_words", "TYPE_STRING", "texts that end the answer; empty ones have no effect", is_list=True),
    TensorSpec("bad_words", "TYPE_STRING", "not supported, unless all of them are empty", is_list=True),
)
FLAGS = (
    TensorSpec("return_finish_reason", "TYPE_BOOL", "send finish_reason"),
    TensorSpec("return_cumulative_logprob", "TYPE_BOOL", "send cumulative_logprob"),
    TensorSpec("return_logprobs", "TYPE_BOOL", "send logprobs"),
    TensorSpec("return_num_input_tokens", "TYPE_BOOL", "send num_input_tokens"),
    TensorSpec("return_num_output_tokens", "TYPE_BOOL", "send num_output_tokens"),
    TensorSpec("return_token_ids", "TYPE_BOOL", "send token_ids"),
    TensorSpec("return_num_accepted", "TYPE_BOOL", "send num_accepted"),
    TensorSpec("return_statistics", "TYPE_BOOL", "send statistics"),
)
INPUTS = (
    TensorSpec("text_input", "TYPE_STRING", "the prompt, taken as it is; or give messages"),
    TensorSpec("messages", "TYPE_STRING", "a JSON list of messages, for the chat template"),
    TensorSpec("stream", "TYPE_BOOL", "answer with one response a decoding step instead of one in all"),
    TensorSpec("exclude_input_in_output", "TYPE_BOOL", "leave the prompt out of text_output; streams always do"),
    TensorSpec("sampling_parameters", "TYPE_STRING", "a JSON object of options, under vLLM's names"),
    TensorSpec("options", "TYPE_STRING", "a JSON object of the runtime's own options, the fields of GenerationOptions"),
    *SAMPLING_INPUTS,
    *FLAGS,
)
OUTPUTS = (
    TensorSpec("text_output", "TYPE_STRING", "the text, one an answer", is_list=True),
    TensorSpec("index", "TYPE_INT32", "which of the answers the response is about, one an answer", is_list=True),
    TensorSpec("finish_reason", "TYPE_STRING", "stop, length, abort or error; None before the end", is_list=True),
    TensorSpec("cumulative_logprob", "TYPE_FP32", "the sum of the log-probabilities of the response's tokens", is_list=True),
    TensorSpec("logprobs", "TYPE_STRING", "JSON: for each token, the log-probabilities of likely ones", is_list=True),
    TensorSpec("num_input_tokens", "TYPE_UINT32", "tokens of the prompt"),
    TensorSpec("num_output_tokens", "TYPE_UINT32", "tokens of the response, one an answer", is_list=True),
    TensorSpec("token_ids", "TYPE_INT32", "token ids of the response, those of all its answers in a row", is_list=True),
    TensorSpec("num_accepted", "TYPE_UINT32", "drafts accepted for the response's tokens, one an answer", is_list=True),
    TensorSpec("statistics", "TYPE_STRING", "with the last response: JSON of DecodingStats, one an answer", is_list=True),
)
