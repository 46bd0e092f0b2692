"""The decoding loop on token ids: propose, verify, accept, commit."""
