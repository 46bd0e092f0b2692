#!/bin/sh
# `make demo`: the whole path on the real model. What exists already is neither fetched nor exported again.
set -eu
: "${BIN:=.venv/bin}" "${MODEL:=smollm2-135m-instruct}" "${BUNDLE:=build/smollm2-135m-instruct-fp32}"
: "${PROMPT:=Explain in three sentences why the sky is blue.}"
run="$BIN/medusa-export"

echo "== fetch $MODEL"
model=$("$run" fetch "$MODEL")
if ! grep -qs '"status": "passed"' "$BUNDLE/manifest.json"; then  # none yet, or interrupted before it was validated
    heads="$BUNDLE-heads"
    echo "== make untrained heads: the output is right with any heads, but only trained ones save steps"
    "$run" heads init "$model" -o "$heads" --num-heads 4 --force
    echo "== export, and validate against PyTorch"
    "$run" onnx "$model" --heads "$heads" -o "$BUNDLE" --force
fi
echo "== Medusa decoding: $PROMPT"
"$run" generate "$BUNDLE" -p "$PROMPT"
echo "== plain autoregressive decoding, same bundle"
"$run" generate "$BUNDLE" -p "$PROMPT" --no-medusa
