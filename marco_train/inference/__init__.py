"""vLLM, in this process and over HTTP: engines, what servers are asked, and waiting for them."""
