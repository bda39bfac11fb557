"""python -m ling_kernels.generate.server --model DIR: an OpenAI-compatible server over the engine.

POST /v1/completions and /v1/chat/completions, whole or streamed; GET /v1/models, /health, /live, /status and /metrics
(Prometheus). --tp and --replicas use several GPUs of a machine; for more, use vLLM or SGLang.
"""
