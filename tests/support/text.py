"""Codecs for tests: a small tokenizer and chat templates, written as a bundle has them."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from medusa_runtime.text.codec import TextCodec
from tests.support.models import CHAT_TEMPLATE, tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def saved_codec(
    directory: Path,
    template: str | None = CHAT_TEMPLATE,
    *,
    core: Tokenizer | None = None,
    templates: dict[str, str] | None = None,
) -> TextCodec:
    """The codec of a directory with the test tokenizer, or another, and chat templates."""
    directory.mkdir(parents=True, exist_ok=True)
    (core or tokenizer().backend_tokenizer).save(str(directory / "tokenizer.json"))
    chat = {"template": template, "special_tokens": {"bos_token": "<s>", "eos_token": "</s>"}}
    chat |= {"templates": templates} if templates else {}
    (directory / "chat.json").write_text(json.dumps(chat), encoding="utf-8")
    return TextCodec(directory)


def byte_fallback_tokenizer(*words: str, scheme: str | None = None, strip: bool = False) -> Tokenizer:
    """A tokenizer as Llama 2 has it: words, and bytes for all else.

    `scheme` is Metaspace's `prepend_scheme`: where a space is put before a text. With None, a normaliser puts it everywhere.
    """
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *BYTES, "▁", *words])}
    core = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if scheme is None:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    core.add_special_tokens([AddedToken(token, normalized=False) for token in ("<s>", "</s>")])
    return core
