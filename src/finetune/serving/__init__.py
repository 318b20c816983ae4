"""What was made, answering questions: prompts as in training, the OpenAI interface over HTTP, and Ollama."""
