#!/usr/bin/env bash
# Puts the same prompts on one or several servers with GuideLLM, and with AIPerf if it is installed.
#
#     scripts/load_test.sh medusa=http://localhost:8000 llama.cpp=http://localhost:8001 vllm=http://gpu:8000
#
# A server is any that has OpenAI's API. Without NAME=, its name is "server". The results are in $OUTPUT, one folder a server.
# The tools need packages that contradict this project's, so each lives in an environment of its own:
#
#     python -m venv .venv-guidellm && .venv-guidellm/bin/pip install guidellm==0.8.1 torch==2.13.0
#     python -m venv .venv-aiperf && .venv-aiperf/bin/pip install aiperf==0.13.0
#
# Variables: STREAMS ("1 4 16"), REQUESTS (of each number of streams: 4 for each stream, if it is not set), OUTPUT (build/load),
# GUIDELLM and AIPERF (the commands), PROMPTS (lines of JSON with prompt and output_tokens_count), TOKENIZER (for AIPerf: the
# directory of a checkpoint; if it is not set, AIPerf fetches one from the internet, though servers tell their numbers of tokens).
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
root="$(dirname "$here")"
STREAMS="${STREAMS:-1 4 16}"
OUTPUT="${OUTPUT:-build/load}"
PROMPTS="${PROMPTS:-$here/load_prompts.jsonl}"
GUIDELLM="${GUIDELLM:-$root/.venv-guidellm/bin/guidellm}"
AIPERF="${AIPERF:-$root/.venv-aiperf/bin/aiperf}"
TOKENIZER="${TOKENIZER:-builtin}"
export NO_COLOR=1

if [ $# -eq 0 ]; then
  echo "Usage: scripts/load_test.sh [NAME=]URL…" >&2
  exit 2
fi
if ! command -v "$GUIDELLM" > /dev/null; then
  echo "Error: there is no $GUIDELLM; install it as $0 says, or set GUIDELLM" >&2
  exit 1
fi

with_guidellm() { # name url streams requests
  HF_HUB_OFFLINE=1 "$GUIDELLM" run --disable-console-interactive \
    --backend "kind=openai_http,target=$2" \
    --profile "kind=concurrent,streams=$3" \
    --constraint "kind=max_requests,count=$4" \
    --data "kind=json_file,path=$PROMPTS" \
    --output "kind=json,path=$OUTPUT/$1/guidellm-$3.json"
}

with_aiperf() { # name url streams requests model
  "$AIPERF" profile --model "$5" --url "$2" --endpoint-type chat --streaming \
    --use-server-token-count --tokenizer "$TOKENIZER" --ui none \
    --concurrency "$3" --request-count "$4" \
    --input-file "$OUTPUT/aiperf_prompts.jsonl" --custom-dataset-type single_turn --extra-inputs ignore_eos:true \
    --output-artifact-dir "$OUTPUT/$1/aiperf-$3"
}

mkdir -p "$OUTPUT"
sed -e 's/"prompt":/"text":/' -e 's/"output_tokens_count":/"output_length":/' "$PROMPTS" > "$OUTPUT/aiperf_prompts.jsonl"
for target in "$@"; do
  case "$target" in
    http*) name=server url="$target" ;;
    *) name="${target%%=*}" url="${target#*=}" ;;
  esac
  mkdir -p "$OUTPUT/$name"
  for streams in $STREAMS; do
    requests="${REQUESTS:-$((4 * streams))}"
    echo "== $name at $url, $streams streams, $requests requests: GuideLLM" >&2
    with_guidellm "$name" "$url" "$streams" "$requests"
    if command -v "$AIPERF" > /dev/null; then
      model="$(curl -fsS "$url/v1/models" | sed -E 's/.*"id": ?"([^"]+)".*/\1/')"
      echo "== $name at $url, $streams streams, $requests requests: AIPerf" >&2
      with_aiperf "$name" "$url" "$streams" "$requests" "$model"
    fi
  done
done
echo "results: $OUTPUT" >&2
