"""From verified logits to tokens: options applied, tokens drawn, drafts accepted."""
