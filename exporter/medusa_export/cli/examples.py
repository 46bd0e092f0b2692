"""Examples in the help of each command. A test parses every one of them."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "fetch": ("medusa-export fetch smollm2-135m-instruct",),
    "distill": (
        "medusa-export distill MODEL --prompts prompts.txt -o data",
        "medusa-export distill MODEL --self-prompts 2000 --temperature 0.7 -o data",
        "medusa-export distill MODEL --backend endpoint --base-url http://localhost:8000/v1 --prompts prompts.txt -o data",
    ),
    "train": (
        "medusa-export train MODEL --data data -o heads",
        "medusa-export train MODEL --data data -o heads --num-heads 3 --epochs 2 --plot",
        "medusa-export train MODEL --data data -o heads --print-config > train.yaml",
        "medusa-export train --config train.yaml",
    ),
    "heads": ("medusa-export heads inspect heads", "medusa-export heads evaluate heads --model MODEL --data data"),
    "heads init": ("medusa-export heads init MODEL -o heads --num-heads 3",),
    "heads inspect": ("medusa-export heads inspect heads --json",),
    "heads convert": ("medusa-export heads convert heads --format vllm -o heads-vllm",),
    "heads evaluate": (
        "medusa-export heads evaluate heads --model MODEL --data data --held-out 0.02 -o heads/evaluation.json",
    ),
    "heads ngrams": ("medusa-export heads ngrams heads --model MODEL --data data",),
    "onnx": (
        "medusa-export onnx MODEL --heads heads -o bundle",
        "medusa-export onnx MODEL --heads heads -o bundle-int8 --quantize int8",
        "medusa-export onnx MODEL --heads heads -o bundle --dtype fp16 --max-seq-len 4096",
    ),
    "quantize": (
        "medusa-export quantize bundle -o bundle-int8",
        "medusa-export quantize bundle -o bundle-int4 --scheme int4 --max-kl 0.1",
    ),
    "validate": (
        "medusa-export validate bundle --reference MODEL --heads heads",
        "medusa-export validate bundle --reference MODEL --json > report.json",
    ),
    "trt": (
        "medusa-export trt bundle -o engine --compute-capability 8.9",
        "medusa-export trt bundle -o engine --dry-run",
        "medusa-export trt inspect engine",
    ),
    "trt build": ("medusa-export trt bundle -o engine --compute-capability 8.9",),
    "trt inspect": ("medusa-export trt inspect engine --json",),
    "tune": (
        "medusa-export tune bundle",
        "medusa-export tune bundle --quick --batch-sizes 1",
        "medusa-export tune bundle --heads heads --prompts prompts.txt --json tuning-report.json",
    ),
    "tree": ("medusa-export tree show bundle",),
    "tree show": ("medusa-export tree show bundle --plot tree.svg",),
    "generate": (
        "medusa-export generate bundle -p 'What is the capital of France?'",
        "medusa-export generate bundle -p 'Name three colours.' --json-schema schema.json",
        "medusa-export generate bundle -p - --temperature 0.8 --seed 7 --max-new-tokens 200 < prompt.txt",
        "medusa-export generate bundle -p 'Why is the sky blue?' --no-medusa --json",
    ),
    "serve": (
        "medusa-export serve bundle",
        "medusa-export serve bundle --host 0.0.0.0 --port 8080 --api-key-file keys.txt",
    ),
    "ray": ("medusa-export ray bundle --replicas 2",),
    "triton": ("medusa-export triton bundle -o models --name my-model",),
    "bench": (
        "medusa-export bench bundle --limit 8 --json bench.json",
        "medusa-export bench bundle bundle-int8 --modes plain,heads,lookup --plot plots",
    ),
    "recipes": ("medusa-export recipes ls", "medusa-export recipes run NAME -o build/NAME"),
    "recipes ls": ("medusa-export recipes ls --json",),
    "recipes show": ("medusa-export recipes show NAME --resolved",),
    "recipes cp": ("medusa-export recipes cp NAME my-recipe.yaml",),
    "recipes validate": ("medusa-export recipes validate my-recipe.yaml",),
    "recipes run": (
        "medusa-export recipes run my-recipe.yaml",
        "medusa-export recipes run my-recipe.yaml --set train.epochs=1 --from train",
    ),
    "inspect": ("medusa-export inspect bundle", "medusa-export inspect bundle --check --json"),
    "diff": ("medusa-export diff bundle bundle-int8", "medusa-export diff bundle other --exit-code"),
    "completion": ("medusa-export completion bash",),
    "doctor": ("medusa-export doctor", "medusa-export doctor --json"),
}
