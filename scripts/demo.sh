#!/bin/sh
# `make demo`: the whole path on the real model, with the trained heads in recipes/heads. What exists is not made again.
set -eu
: "${BIN:=.venv/bin}" "${MODEL:=smollm2-135m-instruct}" "${BUNDLE:=build/smollm2-135m-instruct-fp32}"
: "${HEADS:=recipes/heads/$MODEL}"
: "${PROMPT:=Write a Python function that reverses a string.}"
run="$BIN/medusa-export"

echo "== fetch $MODEL"
model=$("$run" fetch "$MODEL")
digest=$(sed -n 's/^ *"heads": "\([0-9a-f]*\)".*/\1/p' "$HEADS/evaluation.json")
if ! grep -qs '"status": "passed"' "$BUNDLE/manifest.json" || ! grep -qs "$digest" "$BUNDLE/manifest.json"; then
    echo "== export with the heads in $HEADS, and validate against PyTorch"
    "$run" onnx "$model" --heads "$HEADS" -o "$BUNDLE" --force
fi
echo "== Medusa decoding: $PROMPT"
"$run" generate "$BUNDLE" -p "$PROMPT"
echo "== plain autoregressive decoding, same bundle"
"$run" generate "$BUNDLE" -p "$PROMPT" --no-medusa
